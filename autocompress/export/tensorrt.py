"""Uniform INT8 as NVIDIA recommends it for TensorRT."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.core.candidate import FloatPrecision, LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.profile import Profile
from autocompress.export.calibrate import collect_stats
from autocompress.export.graph import to_bytes
from autocompress.export.symmetric import lower_symmetric, weighted_layers

Feeds = Mapping[str, NDArray[np.generic]]


def tensorrt_uniform_int8(model: bytes, batches: Iterable[Feeds], profile: Profile) -> bytes:
    """Explicit Q/DQ in front of every convolution and matrix product with a constant weight, the rest in float16.

    The recipe of NVIDIA's guide, without its tool: Q/DQ placed as in `symmetric`, symmetric scales of the largest
    magnitude, one a channel for weights and one a tensor for activations (INT8_DEFAULT_CFG of its Model Optimizer:
    axis 0, axis None, algorithm "max"), 16-bit arithmetic elsewhere.

    Raises:
        StageError: it cannot be made of this model.
    """
    graph = ir.from_proto(onnx.load_from_string(model))
    layers = weighted_layers(graph.graph)
    if not layers:
        raise StageError("export", "the model has no convolution or matrix product with a constant weight to quantize")
    choices = dict.fromkeys(layers, LayerChoice(weight_bits=8, activation_bits=8))
    floats: FloatPrecision = "fp16" if "fp16" in profile.float_precisions else "fp32"
    stats = collect_stats(graph, layers, batches)
    return to_bytes(lower_symmetric(graph, choices, stats, "minmax", dialect="int8", floats=floats))

"""The operator of each layer in a converted model, by a fingerprint of its weights."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.export.flatbuffer import Flatbuffer, Op

WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "EMBEDDING_LOOKUP"}
# |cosine| between the channels of a layer and of its operator, in two passes. BatchNorm folded in scales a channel and
# does not turn it: 1. LayerNorm's weight folded in turns it a little: 0.992 to 0.998 in a trained transformer, where
# other layers had at most 0.2.
LIKE = (0.999, 0.9)


def find_layers(graph: Flatbuffer, model: nn.Module, layers: Sequence[str]) -> dict[str, Op]:
    """The operator of each layer that exactly one operator can be, and that no other layer can be.

    Of `layers`, those that the model has are looked for: a student may lack some.
    """
    ops = {op.outputs[0]: op for op in graph.ops() if op.kind in WEIGHTED}
    rows = {key: channels for key, op in ops.items() if (channels := _op_channels(graph, op)) is not None}
    weights = weights_of(model)
    wanted = {name: _layer_channels(weights[name]) for name in layers if name in weights}
    likeness = {(name, key): _likeness(channels, row) for name, channels in wanted.items() for key, row in rows.items()}
    found: dict[str, Op] = {}
    for least in LIKE:
        pairs = [pair for pair, value in likeness.items() if value > least and pair[0] not in found]
        pairs = [(name, key) for name, key in pairs if ops[key] not in found.values()]
        names, keys = Counter(name for name, _ in pairs), Counter(key for _, key in pairs)
        found |= {name: ops[key] for name, key in pairs if names[name] == keys[key] == 1}
    return found


def _op_channels(graph: Flatbuffer, op: Op) -> NDArray[Any] | None:
    weight = graph.constant(op.inputs[1])
    if weight is None:
        return None
    if op.kind == "DEPTHWISE_CONV_2D":
        weight = np.moveaxis(weight, 3, 0)
    return _unit(weight.reshape(len(weight), -1))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weight of each layer that has one, by the layer's name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.removesuffix(".weight"): weight for name, weight in named if name.endswith(".weight")}


def _layer_channels(tensor: torch.Tensor) -> NDArray[Any]:
    weight = tensor.detach().cpu().numpy()
    if weight.ndim > 2:
        weight = np.moveaxis(weight, 1, -1)
    return _unit(weight.reshape(len(weight), -1))


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of length one; a row of zeros stays."""
    wide = rows.astype(np.float64)
    unit: NDArray[Any] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit


def _likeness(layer: NDArray[Any], op: NDArray[Any]) -> float:
    """Median |cosine| of the channels that are not zero; 0 for other shapes."""
    if layer.shape != op.shape:
        return 0.0
    cosines = np.abs((layer * op).sum(1))[(layer**2).sum(1) > 0.5]
    return float(np.median(cosines)) if len(cosines) else 0.0

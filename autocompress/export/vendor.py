"""Uniform INT8 as the vendor's own tool makes it: the figure every candidate has to beat."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.extras import require
from autocompress.core.profile import Profile
from autocompress.export.nncf import openvino_uniform_int8
from autocompress.export.tensorrt import tensorrt_uniform_int8

Feeds = Mapping[str, NDArray[np.generic]]


def uniform_int8(model: bytes, batches: Iterable[Feeds], profile: Profile) -> bytes:
    """A float ONNX file as uniform INT8, by the tool of the vendor of the profile's runtime.

    Raises:
        StageError: the tool fails on this model.
    """
    through_tensorrt = profile.options.get("provider") == "tensorrt"  # ONNX Runtime hands the file over as it is
    return _TOOLS.get("tensorrt" if through_tensorrt else profile.runtime, onnxruntime_uniform_int8)(
        model, batches, profile
    )


def onnxruntime_uniform_int8(model: bytes, batches: Iterable[Feeds], profile: Profile) -> bytes:
    """`quant_pre_process`, then `quantize_static` with QDQ, per channel, uint8 activations, int8 weights, min/max.

    These are the settings the ONNX Runtime documentation recommends on x86; `reduce_range` (7-bit weights) is what it
    recommends there for processors without VNNI, which is where a profile has fewer than 8 integer weight bits.

    Raises:
        StageError: the tool fails on this model.
    """
    tool = require("onnxruntime.quantization", "onnxruntime")
    shapes = require("onnxruntime.quantization.shape_inference", "onnxruntime")

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._feeds: Iterator[Feeds] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.generic]] | None:
            feeds = next(self._feeds, None)
            return None if feeds is None else dict(feeds)

    level = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        source, prepared, target = (Path(folder) / name for name in ("fp32.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(model)
        try:
            shapes.quant_pre_process(str(source), str(prepared))
            tool.quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=tool.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=profile.integer_weight_bits < 8,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
            )
            return target.read_bytes()
        except Exception as error:  # a tool of many layers; what it raises is the answer
            raise StageError("export", f"onnxruntime.quantization fails: {type(error).__name__}: {error}") from error
        finally:
            logging.disable(level)


_TOOLS: Mapping[str, Callable[[bytes, Iterable[Feeds], Profile], bytes]] = {
    "onnxruntime": onnxruntime_uniform_int8,
    "openvino": openvino_uniform_int8,
    "tensorrt": tensorrt_uniform_int8,
}

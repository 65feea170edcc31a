"""Uniform INT8 as Intel's NNCF makes it for OpenVINO."""

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.extras import require
from autocompress.core.profile import Profile

Feeds = Mapping[str, NDArray[np.generic]]
SUBSET = 300  # nncf.quantize's own default


def openvino_uniform_int8(model: bytes, batches: Iterable[Feeds], profile: Profile) -> bytes:
    """`nncf.quantize` at its defaults, for the device of the profile, on at most 300 calibration items, one at a time.

    Two settings are not defaults, both as its documentation says. `model_type` is TRANSFORMER for a model with
    attention. Where the profile has fewer than 8 integer weight bits (x86 without VNNI) `overflow_fix` covers all
    layers, not the first alone: on two of the five networks of tests/nets.py the default leaves 17 and 13 dB there and
    this gives 25 and 28, on the others both are within 1 dB.

    Raises:
        StageError: the tool fails on this model.
    """
    nncf = _quiet_nncf()
    items = list(itertools.islice(_items(batches), SUBSET))
    device = str(profile.options.get("device", "CPU")).partition(".")[0]
    fix = nncf.OverflowFix.ENABLE if profile.integer_weight_bits < 8 else None
    with _silence():
        try:
            graph = onnx.load_from_string(model)
            made = nncf.quantize(
                graph,
                nncf.Dataset(items),
                target_device=nncf.TargetDevice(device),
                model_type=nncf.ModelType.TRANSFORMER if has_attention(graph) else None,
                subset_size=max(1, len(items)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
            )
            return bytes(made.SerializeToString())
        except Exception as error:  # a tool of many layers; what it raises is the answer
            raise StageError("export", f"nncf fails: {type(error).__name__}: {error}") from error


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether a graph multiplies two computed matrices with a softmax between such products, as attention does."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and constants.isdisjoint(n.input)]
    return len(products) > 1 and any(node.op_type == "Softmax" for node in model.graph.node)


def _items(batches: Iterable[Feeds]) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Single items: NNCF's statistics are those of a sample, and it takes what comes for one."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: array[i : i + 1] for name, array in batch.items()}


def _quiet_nncf() -> Any:
    """NNCF without its telemetry, which sends what it is used for to its makers; it asks this variable once."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        with _silence():
            return require("nncf", "openvino")
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bars, notes or warnings of NNCF's on our own output."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(nowhere):
                yield
        finally:
            logging.disable(level)

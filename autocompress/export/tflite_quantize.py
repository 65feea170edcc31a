"""One pass of litert-quantizer over a float flatbuffer: which operators get what, and what the file then has."""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.extras import require
from autocompress.export.flatbuffer import Flatbuffer, Op
from autocompress.export.tflite_layers import WEIGHTED
from autocompress.export.weights import on_grid

JOINS = {
    "ADD", "MUL", "CONCATENATION", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN", "RESHAPE", "TRANSPOSE", "PAD",
}  # fmt: skip
KEEPS = {"MAX_POOL_2D", "RESHAPE", "TRANSPOSE", "PAD"}  # the quantizer gives their output the range of their input
_MOST = 2.0**31 - 1


def joins(graph: Flatbuffer, layers: set[str]) -> list[Op]:
    """Operators without weights that run on integers when `layers` do: all they read is integer, and so is a reader."""
    made: set[int] = set()
    found: list[Op] = []
    ops = list(graph.ops())
    for op in ops:
        read = [i for i in op.inputs if i >= 0 and not graph.is_constant(i)]
        constants = [i for i in op.inputs if i >= 0 and graph.is_constant(i) and graph.dtype(i) == "FLOAT32"]
        if graph.name(op.outputs[0]) in layers and op.kind in WEIGHTED:
            made.update(op.outputs)
        elif op.kind in JOINS and read and made.issuperset(read) and not constants:
            made.update(op.outputs)
            found.append(op)
    wanted = {i for op in ops if graph.name(op.outputs[0]) in layers for i in op.inputs}
    kept = []
    for op in reversed(found):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    return kept[::-1]


def quantized(data: bytes, recipe: "list[tuple[str, str, LayerChoice]]", ranges: Mapping[str, Any] | None) -> bytes:
    """`data` with each named operator quantized.

    Raises:
        StageError: the quantizer does not know that precision for that operator, or fails.
    """
    with quiet():
        quantizer = require("litert_quantizer.quantizer", "tflite")
        try:
            tool = quantizer.Quantizer(bytearray(data))
            for name, kind, choice in recipe:
                _configure(tool, f"^{re.escape(name)};", kind, choice)
            return _sound(bytes(tool.quantize(ranges, enable_progress_report=False).quantized_model))
        except Exception as error:  # a tool of many layers; what it raises is the answer
            raise StageError("export", f"litert-quantizer fails: {type(error).__name__}: {error}") from error


def learned_spans(
    graph: Flatbuffer, layers: Collection[str], inputs: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Learned lowest and highest values by tensor, of what these layers read.

    Of several for one tensor the first layer's holds. What only moves values has its output's range.
    """
    spans: dict[int, tuple[float, float]] = {}
    ops = list(graph.ops())
    for op in ops:
        if (name := graph.name(op.outputs[0])) in layers and name in inputs and op.kind in WEIGHTED:
            spans.setdefault(op.inputs[0], inputs[name])
    for op in reversed(ops):
        if op.kind in KEEPS and op.outputs[0] in spans:
            spans.setdefault(op.inputs[0], spans[op.outputs[0]])
    return {graph.name(tensor): span for tensor, span in spans.items()}


def with_scales(
    data: bytes, exact: Flatbuffer, layers: Mapping[str, LayerChoice], scales: Mapping[str, NDArray[np.float32]]
) -> bytes:
    """The quantized file with the integers, scales and biases of weights that lie on learned scales in `exact`.

    The quantizer takes a scale from the largest weight, which on a learned grid need not be the largest integer.
    """
    graph = Flatbuffer(data)
    plain = {exact.name(op.outputs[0]): op for op in exact.ops() if op.kind in WEIGHTED}
    changed = False
    for name, (op, tensor) in _weights(graph).items():
        if name not in layers or name not in scales or graph.dtype(tensor) not in ("INT8", "INT4"):
            continue
        axis, learned = graph.scales(tensor)[1], scales[name]
        weight, *biases = (exact.constant(i) for i in plain[name].inputs[1:])
        q = None if weight is None else on_grid(weight, layers[name].weight_bits, axis, learned)
        if q is None:
            continue
        changed = True
        graph.put(tensor, q, learned)
        if biases and biases[0] is not None and graph.dtype(op.inputs[2]) == "INT32":
            step = learned.astype(np.float64) * graph.scales(op.inputs[0])[0][0]
            graph.put(op.inputs[2], np.rint(np.clip(biases[0] / step, -_MOST, _MOST)), step)
    return graph.data() if changed else data


def _weights(graph: Flatbuffer) -> dict[str, tuple[Op, int]]:
    """By layer of a quantized file, its operator and the tensor that its weight is stored in."""
    makers = {index: op for op in graph.ops() for index in op.outputs}
    found = {}
    for op in graph.ops():
        if op.kind in WEIGHTED:
            weight = op.inputs[1]
            if weight in makers and makers[weight].kind == "DEQUANTIZE":
                weight = makers[weight].inputs[0]
            found[_layer(graph.name(op.outputs[0]))] = (op, weight)
    return found


def check_choices(layers: Mapping[str, LayerChoice]) -> None:
    """Raise StageError for what the format has no form of."""
    for name, choice in layers.items():
        if choice.levels != "uniform":
            why = f"has no codebooks: choose w8 or w4 for layer {name!r}, or a target of ONNX Runtime"
        elif choice.activation_bits < 8:
            why = f"has activations of 8 bits: choose a8 or a32 for layer {name!r}"
        else:
            continue
        raise StageError("export", f"LiteRT has no {choice.precision}; it {why}")


def vendor_quantized(data: bytes, items: Sequence[Mapping[str, NDArray[Any]]]) -> bytes:
    """`data` by litert-quantizer's own recipe over all it can quantize: static, calibrated its way on `items`.

    For a model with attention it is the dynamic one, which the tool's documentation prefers where a device does not
    need integers throughout. A mask of −1e4 before the softmax left the static file of a small encoder 0.09 of the
    original's 0.997 (tests/data/tasks/transformer.py), the dynamic one lost nothing.

    Raises:
        StageError: the quantizer fails.
    """
    with quiet():
        quantizer = require("litert_quantizer.quantizer", "tflite")
        recipes = require("litert_quantizer.recipe", "tflite")
        types = require("litert_quantizer.qtyping", "tflite")
        try:
            if has_attention(Flatbuffer(data)):
                tool = quantizer.Quantizer(bytearray(data), recipes.dynamic_wi8_afp32())
                return _sound(bytes(tool.quantize(enable_progress_report=False).quantized_model))
            tool = quantizer.Quantizer(bytearray(data), recipes.static_wi8_ai8())
            for end in ("INPUT", "OUTPUT"):  # a user's data comes in float and leaves in float
                tool.update_quantization_recipe(".*", types.TFLOperationName(end), algorithm_key="no_quantize")
            ranges = tool.calibrate({"serving_default": items}, num_threads=1)
            return _sound(bytes(tool.quantize(ranges, enable_progress_report=False).quantized_model))
        except Exception as error:  # a tool of many layers; what it raises is the answer
            raise StageError("export", f"litert-quantizer fails: {type(error).__name__}: {error}") from error


def has_attention(graph: Flatbuffer) -> bool:
    """Whether computed matrices are multiplied with each other, twice or more, and there is a softmax."""
    ops = list(graph.ops())
    products = [o for o in ops if o.kind == "BATCH_MATMUL" and not any(graph.is_constant(i) for i in o.inputs)]
    return len(products) > 1 and any(o.kind == "SOFTMAX" for o in ops)


def _sound(data: bytes) -> bytes:
    graph = Flatbuffer(data)
    return graph.data() if graph.give_what_is_signed() else data


def _configure(tool: Any, regex: str, kind: str, choice: LayerChoice) -> None:
    types = require("litert_quantizer.qtyping", "tflite")
    name, bits = types.TFLOperationName(kind), choice.weight_bits
    if choice.weight_bits == 16:
        half = types.TensorQuantizationConfig(num_bits=16, dtype=types.TensorDataType.FLOAT)
        config = types.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=types.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        tool.update_quantization_recipe(regex, name, config, algorithm_key="float_casting")
    elif choice.dynamic or kind == "EMBEDDING_LOOKUP":  # rows of a table are widened as they are looked up
        tool.add_dynamic_config(regex, name, bits)
    elif choice.activation_bits == 8:
        tool.add_static_config(regex, name, 8, bits)
    else:
        tool.add_weight_only_config(regex, name, bits)


def check_types(data: bytes, layers: Mapping[str, LayerChoice]) -> None:
    """Raise StageError unless each layer's weight is stored, and its input given, in the type that was chosen."""
    graph = Flatbuffer(data)
    weights = _weights(graph)
    for name, choice in layers.items():
        if name not in weights:
            raise StageError("export", f"layer {name!r} is not in the quantized file")
        op, weight = weights[name]
        table, read = op.kind == "EMBEDDING_LOOKUP", op.inputs[0]
        stored = {32: "FLOAT32", 16: "FLOAT16", 8: "INT8", 4: "INT4"}.get(choice.weight_bits, "none")
        fed = "INT8" if choice.kernel == "int8" else "FLOAT32"
        got = (graph.dtype(weight), graph.dtype(read))
        if got[0] != stored or (not table and got[1] != fed):
            raise StageError(
                "export",
                f"layer {name!r}: {choice.precision} was asked for, the file has {got[0]} weights, {got[1]} in",
            )


def _layer(name: str) -> str:
    """A layer's name from that of its tensor: the quantizer renames what it splits."""
    return re.sub(r"(_dequant|_quantized)+$", "", name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence of tools that speak of their progress, and of packages they have no use for, natively too."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        logging.disable(level)

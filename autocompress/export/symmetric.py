"""Lowering in TensorRT's dialect: symmetric, zero points 0, in eight-bit integers or eight-bit floats.

Q and DQ stand where NVIDIA's guide recommends them ("Q/DQ layer-placement recommendations"): on every input of a layer
that computes in eight bits and on the residual input of an addition behind a convolution, and nowhere else: not on
outputs (TensorRT moves and fuses the pairs through pools, rectifiers and reshapes by itself), not on biases, which its
importer refuses as integers. Rectifiers stay: zero is in the middle here. The network is strongly typed, so the
precision of the floats is written into the file too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.quantize import PERCENTILE, ActivationStats, Learned, activation_scale, quantize_weight
from autocompress.core.candidate import FloatPrecision, LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator
from autocompress.export.floats import cast_floats, positive
from autocompress.export.graph import array_of, constant, insert, only_consumer, tidy
from autocompress.export.weights import Scales, on_grid, round_weight

Dialect = Literal["int8", "fp8"]
_PRODUCTS = ("Gemm", "MatMul")
_WEIGHTED = ("Conv", *_PRODUCTS)
_SHRINKS = np.linspace(1.0, 0.4, 25)
_BLOCKS = (128, 64, 32, 16)  # 128 is what NVIDIA's Model Optimizer takes for 4-bit weights
Reads = dict[ir.Value, list[tuple[ir.Node, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Eight bits: the largest number, and their type."""

    top: float
    dtype: np.dtype[Any]

    def round(self, values: NDArray[Any]) -> NDArray[Any]:
        """The nearest numbers, the outermost ones for what is beyond."""
        inside = np.clip(values, -self.top, self.top)
        return np.asarray(np.rint(inside) if self.dtype == np.int8 else inside).astype(self.dtype)


_FORMS: Mapping[Dialect, _Form] = {
    "int8": _Form(top=127.0, dtype=np.dtype(np.int8)),
    "fp8": _Form(top=448.0, dtype=np.dtype(ml_dtypes.float8_e4m3fn)),
}


def lower_symmetric(
    model: ir.Model,
    layers: Mapping[str, LayerChoice],
    stats: Mapping[str, ActivationStats],
    calibrator: Calibrator,
    *,
    dialect: Dialect,
    floats: FloatPrecision = "fp32",
    learned: Learned = Learned(),  # noqa: B008 (frozen)
) -> ir.Model:
    """Quantize `model` in place as `layers` say, and compute the rest in `floats`.

    Args:
        model: a float graph whose layer nodes are named after their layers.
        layers: choices by layer name; names that are no node of the graph are an error.
        stats: calibration of every tensor that an eight-bit layer reads, by tensor name.
        learned: scales of weights that lie on them, and ranges of layers' inputs, that stand for those found here.

    Raises:
        StageError: a layer is not in the graph, its range was not calibrated, or TensorRT has no such precision.
    """
    graph, form = model.graph, _FORMS[dialect]
    nodes = {str(node.name): node for node in graph}
    for name, choice in layers.items():
        if name not in nodes:
            raise StageError("export", f"layer {name!r} is not in the exported graph")
        _check(nodes[name], choice, dialect)
    eight = [nodes[name] for name, choice in layers.items() if _computes_in_eight(nodes[name], choice)]
    for value, uses in _reads(graph, eight, stats).items():
        spans = (learned.inputs.get(str(node.name)) for node, _ in uses)
        if (span := next((found for found in spans if found), None)) is not None:
            scale = positive(np.array(max(-span[0], span[1]) / form.top), floats)
        else:
            scale = _scale(value, stats, calibrator, form, floats)
        _insert_pair(graph, value, uses, scale, form)
    for name, choice in layers.items():
        if choice.weight_bits <= 8:
            _store(graph, nodes[name], choice, form, floats, learned.scales.get(name))
    return tidy(cast_floats(model, floats))


def weighted_layers(graph: ir.Graph) -> list[str]:
    """Names of all nodes that multiply by a constant weight."""
    return [str(node.name) for node in graph if node.op_type in _WEIGHTED and array_of(node.inputs[1]) is not None]


def _computes_in_eight(node: ir.Node, choice: LayerChoice) -> bool:
    return choice.kernel == "int8" and node.op_type in _WEIGHTED


def _check(node: ir.Node, choice: LayerChoice, dialect: Dialect) -> None:
    integer = _computes_in_eight(node, choice)
    if choice.levels != "uniform":
        why = "it looks no weights up in a codebook"
    elif integer and choice.activation_bits < 8:
        why = "it has no activations of fewer bits"
    elif choice.weight_bits == 16:
        why = "16-bit weights go with 16-bit arithmetic: choose a float precision"
    elif dialect == "fp8" and integer and choice.weight_bits < 8:
        why = "eight-bit floats have no smaller weights"
    elif choice.weight_bits <= 4 and not integer and node.op_type not in _PRODUCTS:
        why = "4-bit weights are for matrix products only"
    else:
        return
    raise StageError("export", f"TensorRT has no {choice.precision} for {node.name!r}, a {node.op_type}: {why}")


def _reads(graph: ir.Graph, eight: list[ir.Node], stats: Mapping[str, ActivationStats]) -> Reads:
    """What is read in eight bits, and where: activations of layers, then residuals of additions."""
    found: Reads = {}
    for node in eight:
        value = node.inputs[0]
        assert value is not None
        found.setdefault(value, []).append((node, 0))
    for value, addition, index in list(_residuals(graph, set(eight), set(found))):
        if value.name in stats:
            found.setdefault(value, []).append((addition, index))
    return found


def _residuals(graph: ir.Graph, eight: set[ir.Node], known: set[ir.Value]) -> Iterable[tuple[ir.Value, ir.Node, int]]:
    """The other input of additions that TensorRT fuses into an eight-bit convolution."""
    for node in graph:
        if node.op_type != "Add":
            continue
        for trunk, other, index in ((node.inputs[0], node.inputs[1], 1), (node.inputs[1], node.inputs[0], 0)):
            made = trunk.producer() if trunk is not None else None
            if made not in eight or made.op_type != "Conv" or only_consumer(trunk) is not node or other is None:
                continue
            if other in known or other.producer() in eight:
                yield other, node, index
                break


def _scale(
    value: ir.Value,
    stats: Mapping[str, ActivationStats],
    calibrator: Calibrator,
    form: _Form,
    floats: FloatPrecision,
) -> NDArray[np.float32]:
    """The scale of an activation, as the precision holds it: of its true extremes, of a percentile, with the least
    squared error, or with the least divergence.
    """
    seen = stats.get(str(value.name))
    if seen is None:
        raise StageError("calibrate", f"no range is known of tensor {value.name!r}")
    top = max(abs(seen.low), abs(seen.high))
    if not np.isfinite(top):
        raise StageError(
            "calibrate", f"activation {value.name!r} ranges from {seen.low} to {seen.high} on the calibration data"
        )
    if calibrator == "percentile":
        top = min(top, float(np.percentile(np.abs(seen.sample), PERCENTILE)))
    if calibrator == "entropy":  # of magnitudes, which have the 127 upper values of eight bits
        magnitudes = ActivationStats(low=0.0, high=top, sample=np.abs(seen.sample))
        top = 127 * activation_scale(magnitudes, calibrator, str(value.name), bits=7).scale
    scale = positive(np.array(top / form.top), floats)
    if calibrator == "mse":
        scales = [positive(np.array(top * s / form.top), floats) for s in _SHRINKS]
        errors = [_squared_error(seen.sample, s, form) for s in scales]
        scale = scales[int(np.argmin(errors))]
    return scale


def _squared_error(sample: NDArray[np.float32], scale: NDArray[np.float32], form: _Form) -> float:
    return float(((form.round(sample / scale).astype(np.float32) * scale - sample) ** 2).mean())


def _insert_pair(
    graph: ir.Graph,
    value: ir.Value,
    uses: list[tuple[ir.Node, int]],
    scale: NDArray[np.float32],
    form: _Form,
) -> None:
    """Q and DQ between `value` and these readers; others go on reading it as it is."""
    name = str(value.name)
    both = [constant(graph, f"{name}.scale", scale), constant(graph, f"{name}.zero_point", np.zeros((), form.dtype))]
    quantize = ir.node("QuantizeLinear", [value, *both], name=f"{name}.q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *both], name=f"{name}.dq")
    for node in (quantize, dequantize):
        node.outputs[0].name = node.name
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    for node, index in uses:
        node.replace_input_with(index, dequantize.outputs[0])


def _store(
    graph: ir.Graph,
    node: ir.Node,
    choice: LayerChoice,
    form: _Form,
    floats: FloatPrecision,
    learned: Scales | None,
) -> None:
    """The weight of a layer in eight or four bits, with DequantizeLinear."""
    index = 0 if node.op_type == "Gather" else 1
    weight = array_of(node.inputs[index])
    if weight is None:
        raise StageError("export", f"the weight of {node.name!r} is not a constant of the graph")
    array = np.asarray(weight, np.float32)
    if choice.weight_bits <= 4 and not _computes_in_eight(node, choice):
        stored = _four_bits(graph, node, array, choice.weight_bits, floats, learned)
    else:
        stored = _eight_bits(graph, node, array, choice, form, floats, learned)
    node.replace_input_with(index, stored)


def _eight_bits(
    graph: ir.Graph,
    node: ir.Node,
    weight: NDArray[np.float32],
    choice: LayerChoice,
    form: _Form,
    floats: FloatPrecision,
    learned: Scales | None,
) -> ir.Value:
    """One scale a channel. Layers that compute in floats have integers in either dialect."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    axis = 1 if node.op_type in _PRODUCTS and not transposed else 0
    used = form if _computes_in_eight(node, choice) else _FORMS["int8"]
    if used.dtype == np.int8:
        scale = round_weight(weight, choice.weight_bits, axis, learned)[1]
        top = 2.0 ** (choice.weight_bits - 1) - 1
    else:
        scale = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(1) / used.top
        top = used.top
    scale = positive(scale, floats)
    shape = [1] * weight.ndim
    shape[axis] = -1
    values = used.round(np.clip(weight / scale.reshape(shape), -top, top))
    name = str(node.name)
    inputs: list[ir.Value | None] = [
        constant(graph, f"{name}.weight_q", values),
        constant(graph, f"{name}.weight_scale", scale),
        constant(graph, f"{name}.weight_zero_point", np.zeros(len(scale), used.dtype)),
    ]
    return insert(graph, node, "DequantizeLinear", inputs, f"{name}.weight_dq", axis=axis)


def _four_bits(
    graph: ir.Graph,
    node: ir.Node,
    weight: NDArray[np.float32],
    bits: int,
    floats: FloatPrecision,
    learned: Scales | None,
) -> ir.Value:
    """One scale for each block of input channels, the weight as (inputs, outputs): NVIDIA's own form."""
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        weight = np.ascontiguousarray(weight.T)
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    inputs, outputs = weight.shape
    if weight.size % 2:
        raise StageError("export", f"4-bit weights lie two to a byte, {node.name!r} has {weight.size} of them")
    block = next((size for size in _BLOCKS if inputs % size == 0), inputs)
    blocks = weight.reshape(-1, block, outputs)
    if learned is not None and on_grid(weight, bits, 1, learned) is not None:
        found = np.tile(learned, inputs // block)
    else:
        found = quantize_weight(blocks.transpose(0, 2, 1).reshape(-1, block), bits, 0)[1]
    scale = positive(found, floats).reshape(-1, 1, outputs)
    top = 2 ** (bits - 1) - 1
    values = np.clip(np.rint(blocks / scale), -top, top).astype(ml_dtypes.int4).reshape(inputs, outputs)
    name = str(node.name)
    packed = constant(graph, f"{name}.weight_int4", ir.tensor(values, dtype=ir.DataType.INT4))
    scales = constant(graph, f"{name}.weight_scale", scale.reshape(-1, outputs))
    return insert(graph, node, "DequantizeLinear", [packed, scales], f"{name}.weight_dq", axis=0, block_size=block)

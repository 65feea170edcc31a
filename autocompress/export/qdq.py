"""Lowering: a float graph and a choice per layer become a quantized graph with Q/DQ nodes, in a runtime's dialect.

The x86 dialect (ONNX Runtime, OpenVINO): uint8 asymmetric activations, int8 symmetric weights per channel, int32
biases. Integer regions are as large as the choices allow: additions, concatenations and pools between integer layers
are integer too; Softmax, masks, normalisations and what follows them stay float.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.quantize import ActivationScale, ActivationStats, Learned, activation_scale, quantize_weight
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator
from autocompress.export.graph import array_of, constant, insert, only_consumer, tidy
from autocompress.export.storage import store_floats, store_integers, store_scaled

_KEEPS_SCALE = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}
_JOINS = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_WEIGHTED = {"Conv", "Gemm", "MatMul"}


_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def integer_weight_bits(facts: Mapping[str, str]) -> int:
    """Bits of weights that the kernels of this machine multiply exactly, given its fingerprint's facts.

    x86 without VNNI adds pairs of uint8 × int8 products in saturating 16 bits: weights of 8 bits overflow there, of 7
    they cannot. ONNX Runtime's documentation calls the remedy `reduce_range`.
    """
    x86 = facts.get("arch") in ("x86_64", "AMD64")
    return 7 if x86 and not _VNNI & set(facts.get("flags", "").split()) else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A node that runs on integers, with the activation it swallows; `inputs` and `output` are the tensors between."""

    node: ir.Node
    activation: ir.Node | None
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    integer_output: bool


def integer_units(graph: ir.Graph, layers: set[str]) -> list[Unit]:
    """The nodes that run on integers when `layers` do, in topological order."""
    units: list[Unit] = []
    made: dict[ir.Value, Unit] = {}
    for node in graph:
        is_layer = node.name in layers and node.op_type in _WEIGHTED
        inputs = _tensors(node)
        joins = node.op_type in _JOINS | _KEEPS_SCALE and inputs and all(v in made for v in inputs)
        if not (is_layer or (joins and _whole(node, inputs))):
            continue
        swallowed = only_consumer(node.outputs[0]) if node.op_type not in _KEEPS_SCALE | {"MatMul"} else None
        if swallowed is not None and not _is_rectifier(swallowed):
            swallowed = None
        output = (swallowed or node).outputs[0]
        unit = Unit(
            node=node,
            activation=swallowed,
            inputs=tuple(inputs[:1] if is_layer else inputs),
            output=output,
            integer_output=True,
        )
        units.append(unit)
        made[output] = unit
    return _useful(units, layers)


def _useful(units: list[Unit], layers: set[str]) -> list[Unit]:
    """Without the joins that feed no integer node; a last Gemm keeps its output in float."""
    wanted: set[ir.Value] = set()
    kept = []
    for unit in reversed(units):
        is_layer = unit.node.name in layers and unit.node.op_type in _WEIGHTED
        if not is_layer and unit.output not in wanted:
            continue
        wanted.update(unit.inputs)
        if unit.node.op_type == "Gemm" and unit.output not in wanted and unit.activation is None:
            unit = Unit(node=unit.node, activation=None, inputs=unit.inputs, output=unit.output, integer_output=False)
        kept.append(unit)
    return kept[::-1]


def lower(
    model: ir.Model,
    layers: Mapping[str, LayerChoice],
    stats: Mapping[str, ActivationStats],
    calibrator: Calibrator,
    learned: Learned = Learned(),  # noqa: B008 (frozen)
) -> ir.Model:
    """Quantize `model` in place as `layers` say.

    Args:
        model: a float graph whose layer nodes are named after their layers.
        layers: choices by layer name; names that are no node of the graph are an error.
        stats: calibration of every tensor that may become integer, by tensor name.

    Raises:
        StageError: a layer is not in the graph, or its range was not calibrated.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    for name in layers:
        if name not in nodes:
            raise StageError("export", f"layer {name!r} is not in the exported graph")
    integer = {name for name, choice in layers.items() if choice.kernel == "int8"}
    units = integer_units(graph, integer)
    scales = _tensor_scales(units, stats, calibrator)
    weights = {
        unit.node: _integer_weight(graph, unit.node, layers[str(unit.node.name)], scales[unit.inputs[0]])
        for unit in units
        if unit.node.name in integer
    }
    for name, choice in layers.items():
        if nodes[name] not in weights and choice != LayerChoice():
            _store_float_layer(graph, nodes[name], choice)
    _insert_pairs(graph, units, scales)
    return tidy(model)


def _tensor_scales(
    units: list[Unit], stats: Mapping[str, ActivationStats], calibrator: Calibrator
) -> dict[ir.Value, ActivationScale]:
    scales: dict[ir.Value, ActivationScale] = {}
    for unit in units:
        for value in unit.inputs:
            if value not in scales:
                scales[value] = _scale_of(value, stats, calibrator)
        if unit.node.op_type in _KEEPS_SCALE:
            scales[unit.output] = scales[unit.inputs[0]]
        elif unit.integer_output:
            scales[unit.output] = _scale_of(unit.output, stats, calibrator)
    return scales


def _scale_of(value: ir.Value, stats: Mapping[str, ActivationStats], calibrator: Calibrator) -> ActivationScale:
    if value.name not in stats:
        raise StageError("calibrate", f"no range is known of tensor {value.name!r}")
    return activation_scale(stats[str(value.name)], calibrator, str(value.name))


def _insert_pairs(graph: ir.Graph, units: list[Unit], scales: Mapping[ir.Value, ActivationScale]) -> None:
    """Q and DQ on every integer tensor. Float readers of an integer node's output read what it rounded."""
    made = {unit.output for unit in units if unit.integer_output}
    readers = {unit.node for unit in units}
    order = {node: i for i, node in enumerate(graph)}
    swallowed = {unit.output: unit for unit in units if unit.activation is not None}
    for value, s in scales.items():
        uses = [(use.node, use.idx) for use in value.uses() if value in made or use.node in readers]
        if not uses and not value.is_graph_output():
            continue
        source = value
        if value in swallowed and (unit := swallowed[value]).activation is not None and _is_idle(unit.activation, s):
            source = unit.node.outputs[0]
        first = min((node for node, _ in uses), key=lambda n: order[n], default=None)
        rounded = _insert_pair(graph, str(value.name), source, uses, first, s)
        if value in made and value.is_graph_output():
            _rename_output(graph, value, rounded)


def _insert_pair(
    graph: ir.Graph,
    name: str,
    source: ir.Value,
    uses: list[tuple[ir.Node, int]],
    first: ir.Node | None,
    s: ActivationScale,
) -> ir.Value:
    scale = constant(graph, f"{name}.scale", np.float32(s.scale))
    zero = constant(graph, f"{name}.zero_point", np.uint8(s.zero_point))
    quantize = ir.node("QuantizeLinear", [source, scale, zero], outputs=[ir.Value(name=f"{name}.q")], name=f"{name}.q")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale, zero], outputs=[ir.Value(name=f"{name}.dq")], name=f"{name}.dq"
    )
    producer = source.producer()
    if producer is not None:
        graph.insert_after(producer, [quantize, dequantize])
    elif first is not None:
        graph.insert_before(first, [quantize, dequantize])
    rounded = dequantize.outputs[0]
    for node, index in uses:
        node.replace_input_with(index, rounded)
    return rounded


def _rename_output(graph: ir.Graph, value: ir.Value, rounded: ir.Value) -> None:
    name = value.name
    value.name, rounded.name = f"{name}.exact", name
    rounded.shape, rounded.type = value.shape, value.type
    graph.outputs[list(graph.outputs).index(value)] = rounded


def _integer_weight(graph: ir.Graph, node: ir.Node, choice: LayerChoice, x: ActivationScale) -> ir.Value:
    """Weight and bias of an integer layer as integers with DequantizeLinear."""
    weight, axis = _weight(node)
    q, scale = quantize_weight(weight, choice.weight_bits, axis)
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        # An (almost) all-zero channel has a scale so small that its bias would leave int32.
        scale = np.maximum(scale, np.abs(bias).astype(np.float32) / (x.scale * 2.0**30)).astype(np.float32)
        shape = [1] * weight.ndim
        shape[axis] = -1
        top = 2 ** (choice.weight_bits - 1) - 1
        q = np.clip(np.rint(weight / scale.reshape(shape)), -top, top).astype(np.int8)
    name = str(node.name)
    integers = store_integers(graph, node, name, q, choice.weight_bits)
    scales = constant(graph, f"{name}.weight_scale", scale)
    zeros = constant(graph, f"{name}.weight_zero_point", np.zeros(len(scale), np.int8))
    rounded = insert(graph, node, "DequantizeLinear", [integers, scales, zeros], f"{name}.weight_dq", axis=axis)
    node.replace_input_with(1, rounded)
    if bias is not None:
        step = scale.astype(np.float64) * x.scale
        q_bias = constant(graph, f"{name}.bias_int32", np.rint(bias.astype(np.float64) / step).astype(np.int32))
        steps = constant(graph, f"{name}.bias_scale", step.astype(np.float32))
        zeros32 = constant(graph, f"{name}.bias_zero_point", np.zeros(len(scale), np.int32))
        node.replace_input_with(
            2, insert(graph, node, "DequantizeLinear", [q_bias, steps, zeros32], f"{name}.bias_dq", axis=0)
        )
    return rounded


def _store_float_layer(graph: ir.Graph, node: ir.Node, choice: LayerChoice) -> None:
    """A layer that runs in float: its weight in a smaller form of storage."""
    weight, axis = _weight(node)
    name = str(node.name)
    if choice.weight_bits <= 8:
        q, scale = quantize_weight(weight, choice.weight_bits, axis)
        value = store_scaled(graph, node, name, q, scale, axis, choice.weight_bits)
    else:
        value = store_floats(graph, node, name, weight, choice.weight_bits)
    node.replace_input_with(0 if node.op_type == "Gather" else 1, value)


def _weight(node: ir.Node) -> tuple[NDArray[np.float32], int]:
    """The weight of a layer's node and the axis of its output channels (for an embedding: of its rows)."""
    array = array_of(node.inputs[0 if node.op_type == "Gather" else 1])
    if array is None:
        raise StageError("export", f"the weight of {node.name!r} is not a constant of the graph")
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    axis = 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed) else 0
    return np.asarray(array, np.float32), axis


def _tensors(node: ir.Node) -> list[ir.Value]:
    """Inputs that are computed or fed, not constants."""
    return [v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is None]


def _whole(node: ir.Node, inputs: list[ir.Value]) -> bool:
    """Whether all inputs of a join are tensors; one with a constant (a bias after MatMul, say) stays float."""
    return node.op_type in _KEEPS_SCALE or len(inputs) == len([v for v in node.inputs if v is not None])


def _is_rectifier(node: ir.Node) -> bool:
    return node.op_type == "Relu" or (node.op_type == "Clip" and _clip_low(node) == 0.0)


def _clip_low(node: ir.Node) -> float | None:
    low = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    return None if low is None else float(low.numpy())


def _is_idle(node: ir.Node, s: ActivationScale) -> bool:
    """Whether uint8 saturation already does what a rectifier does: its zero is the lowest integer, its top above."""
    if s.zero_point != 0:
        return False
    if node.op_type == "Relu":
        return True
    high = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return high is None or 255 * s.scale <= float(high.numpy()) * (1 + 1e-6)

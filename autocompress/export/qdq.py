"""Lowering: a float graph and a choice per layer become a quantized graph with Q/DQ nodes, in a runtime's dialect.

The x86 dialect (ONNX Runtime, OpenVINO): uint8 asymmetric activations, int8 symmetric weights per channel, int32
biases. Integer regions are as large as the choices allow: additions, concatenations and pools between integer layers
are integer too; Softmax, masks, normalisations and what follows them stay float.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from autocompress.compress.quantize import ActivationStats, Learned
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator
from autocompress.export.graph import constant, only_consumer, tidy
from autocompress.export.ranges import KEEPS_SCALE, Steps, Unit, find_ranges
from autocompress.export.weights import Kernels, put_floats, put_integers

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


def integer_units(graph: ir.Graph, layers: set[str]) -> list[Unit]:
    """The nodes that run on integers when `layers` do, in topological order."""
    units: list[Unit] = []
    made: dict[ir.Value, Unit] = {}
    for node in graph:
        is_layer = node.name in layers and node.op_type in _WEIGHTED
        inputs = _tensors(node)
        joins = node.op_type in _JOINS | KEEPS_SCALE and inputs and all(v in made for v in inputs)
        if not (is_layer or (joins and _whole(node, inputs))):
            continue
        swallowed = only_consumer(node.outputs[0]) if node.op_type not in KEEPS_SCALE | {"MatMul"} else None
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
    *,
    kernels: Kernels = Kernels(),  # noqa: B008 (frozen)
) -> ir.Model:
    """Quantize `model` in place as `layers` say.

    Args:
        model: a float graph whose layer nodes are named after their layers.
        layers: choices by layer name; names that are no node of the graph are an error.
        stats: calibration of every tensor that may become integer, by tensor name.
        learned: scales that stand for those that would be found here, where the weights lie on them, and ranges of
            layers' inputs that stand for what calibration saw.
        kernels: what those of the device take.

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
    ranges = find_ranges(units, layers, stats, calibrator, learned)
    scales = {str(unit.node.name): ranges.read_by(unit).scale for unit in units if unit.node.name in integer}
    for name, choice in layers.items():
        if name in scales:
            put_integers(graph, nodes[name], choice, scales[name], learned.scales.get(name), kernels)
        elif choice != LayerChoice():
            put_floats(graph, nodes[name], choice, learned.scales.get(name))
    _insert_pairs(graph, units, ranges.tensors)
    for node, steps in ranges.narrow.items():
        wide = node.inputs[0]
        assert wide is not None
        _insert_pair(graph, f"{node.name}.input", wide, [(node, 0)], node, steps)
    return tidy(model)


def _insert_pairs(graph: ir.Graph, units: list[Unit], scales: Mapping[ir.Value, Steps]) -> None:
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
    s: Steps,
) -> ir.Value:
    scale = constant(graph, f"{name}.scale", np.float32(s.scale))
    zero = constant(graph, f"{name}.zero_point", np.uint8(s.zero_point))
    quantize = ir.node("QuantizeLinear", [source, scale, zero], outputs=[ir.Value(name=f"{name}.q")], name=f"{name}.q")
    pair = [quantize]
    if s.top < 255:
        top = constant(graph, f"{name}.top", np.uint8(s.top))
        pair.append(ir.node("Clip", [quantize.outputs[0], None, top], name=f"{name}.clip"))
        pair[-1].outputs[0].name = f"{name}.clip"
    dequantize = ir.node(
        "DequantizeLinear", [pair[-1].outputs[0], scale, zero], outputs=[ir.Value(name=f"{name}.dq")], name=f"{name}.dq"
    )
    pair.append(dequantize)
    producer = source.producer()
    if producer is not None:
        graph.insert_after(producer, pair)
    elif first is not None:
        graph.insert_before(first, pair)
    rounded = dequantize.outputs[0]
    for node, index in uses:
        node.replace_input_with(index, rounded)
    return rounded


def _rename_output(graph: ir.Graph, value: ir.Value, rounded: ir.Value) -> None:
    name = value.name
    value.name, rounded.name = f"{name}.exact", name
    rounded.shape, rounded.type = value.shape, value.type
    graph.outputs[list(graph.outputs).index(value)] = rounded


def _tensors(node: ir.Node) -> list[ir.Value]:
    """Inputs that are computed or fed, not constants."""
    return [v for v in node.inputs if v is not None and ir.convenience.get_const_tensor(v) is None]


def _whole(node: ir.Node, inputs: list[ir.Value]) -> bool:
    """Whether all inputs of a join are tensors; one with a constant (a bias after MatMul, say) stays float."""
    return node.op_type in KEEPS_SCALE or len(inputs) == len([v for v in node.inputs if v is not None])


def _is_rectifier(node: ir.Node) -> bool:
    return node.op_type == "Relu" or (node.op_type == "Clip" and _clip_low(node) == 0.0)


def _clip_low(node: ir.Node) -> float | None:
    low = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    return None if low is None else float(low.numpy())


def _is_idle(node: ir.Node, s: Steps) -> bool:
    """Whether uint8 saturation already does what a rectifier does: its zero is the lowest integer, its top above."""
    if s.zero_point != 0:
        return False
    if node.op_type == "Relu":
        return True
    high = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return high is None or s.top * s.scale <= float(high.numpy()) * (1 + 1e-6)

"""Which integers stand for which activations, in the dialect of x86: uint8, of which fewer bits use the lowest values.

What was learned of a layer's input holds for the tensor that it reads; else calibration tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from autocompress.compress.quantize import ActivationStats, Learned, activation_scale
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator

KEEPS_SCALE = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A node that runs on integers, with the activation it swallows; `inputs` and `output` are the tensors between."""

    node: ir.Node
    activation: ir.Node | None
    inputs: tuple[ir.Value, ...]
    output: ir.Value
    integer_output: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Integers of a tensor: real = scale · (q − zero_point), q from 0 to `top`."""

    scale: float
    zero_point: int
    top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Integers of tensors, and of layers that take fewer values than the tensor they read has for its other readers."""

    tensors: Mapping[ir.Value, Steps]
    narrow: Mapping[ir.Node, Steps]

    def read_by(self, unit: Unit) -> Steps:
        """What a unit's first input holds."""
        return self.narrow.get(unit.node) or self.tensors[unit.inputs[0]]


def find_ranges(
    units: Sequence[Unit],
    layers: Mapping[str, LayerChoice],
    stats: Mapping[str, ActivationStats],
    calibrator: Calibrator,
    learned: Learned,
) -> Ranges:
    """Integers of all that `units` read and give.

    A tensor has the bits of its most demanding reader; what is not a layer, in integers or in float, demands 8. Of
    several learned ranges for one tensor the first layer's holds. A pool's or a reshape's input and output share
    theirs.

    Raises:
        StageError: a tensor's range was not calibrated.
    """
    bits = _bits(units, layers)
    wanted = {unit.node: layers[str(unit.node.name)].activation_bits for unit in units if _is_layer(unit, layers)}
    known: dict[ir.Value, tuple[float, float]] = {}
    for unit in units:
        span = learned.inputs.get(str(unit.node.name))
        if unit.node in wanted and span is not None and wanted[unit.node] == bits[unit.inputs[0]]:
            known.setdefault(unit.inputs[0], span)
    for unit in reversed(units):
        if unit.node.op_type in KEEPS_SCALE and unit.output in known:
            known.setdefault(unit.inputs[0], known[unit.output])

    def steps(value: ir.Value, wide: int, span: tuple[float, float] | None) -> Steps:
        return _learned(*span, wide) if span is not None else _calibrated(value, stats, calibrator, wide)

    tensors: dict[ir.Value, Steps] = {}
    narrow: dict[ir.Node, Steps] = {}
    for unit in units:
        for value in unit.inputs:
            if value not in tensors:
                tensors[value] = steps(value, bits[value], known.get(value))
        if unit.node.op_type in KEEPS_SCALE:
            tensors[unit.output] = tensors[unit.inputs[0]]
        elif unit.integer_output:
            tensors[unit.output] = steps(unit.output, bits[unit.output], known.get(unit.output))
        few = wanted.get(unit.node, 8)
        if few < bits[unit.inputs[0]]:
            narrow[unit.node] = steps(unit.inputs[0], few, learned.inputs.get(str(unit.node.name)))
    return Ranges(tensors=tensors, narrow=narrow)


def _bits(units: Sequence[Unit], layers: Mapping[str, LayerChoice]) -> dict[ir.Value, int]:
    readers = {unit.node for unit in units}
    bits: dict[ir.Value, int] = {}
    for unit in reversed(units):
        outside = unit.output.is_graph_output() or any(use.node not in readers for use in unit.output.uses())
        if outside or unit.output not in bits:
            bits[unit.output] = 8
        demand = 8
        if _is_layer(unit, layers):
            demand = layers[str(unit.node.name)].activation_bits
        elif unit.node.op_type in KEEPS_SCALE:
            demand = bits[unit.output]
        for value in unit.inputs:
            bits[value] = max(demand, bits.get(value, 0))
    for unit in units:
        if unit.node.op_type in KEEPS_SCALE:
            bits[unit.output] = bits[unit.inputs[0]]
    return bits


def _is_layer(unit: Unit, layers: Mapping[str, LayerChoice]) -> bool:
    return unit.node.name in layers


def _learned(low: float, high: float, bits: int) -> Steps:
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = max((high - low) / top, 1e-8)
    return Steps(scale=scale, zero_point=min(max(round(-low / scale), 0), top), top=top)


def _calibrated(value: ir.Value, stats: Mapping[str, ActivationStats], calibrator: Calibrator, bits: int) -> Steps:
    if value.name not in stats:
        raise StageError("calibrate", f"no range is known of tensor {value.name!r}")
    found = activation_scale(stats[str(value.name)], calibrator, str(value.name), bits)
    return Steps(scale=found.scale, zero_point=found.zero_point, top=2**bits - 1)

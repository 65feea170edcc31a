"""Calibration: what values the tensors of a float graph take, seen by ONNX Runtime on the task's data.

The statistics are computed inside the graph, so that only a few numbers leave it: extremes of every item, and an
evenly spaced sample for the calibrators that look at the distribution.
"""

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.quantize import ActivationStats
from autocompress.export.graph import constant, tidy, to_bytes
from autocompress.export.qdq import integer_units
from autocompress.export.session import Feeds, Session

_STRIDE = 61  # prime, so that it does not walk in step with rows or channels
_SAMPLES = 1 << 16


def collect_stats(model: ir.Model, layers: Iterable[str], batches: Iterable[Feeds]) -> dict[str, ActivationStats]:
    """Statistics of every tensor that can become integer when all `layers` do, by tensor name."""
    observed = model.clone()
    graph = observed.graph
    units = integer_units(graph, set(layers))
    tensors = list(dict.fromkeys(v for unit in units for v in (*unit.inputs, unit.output)))
    if not tensors:
        return {}
    original = list(graph.outputs)
    for value in tensors:
        graph.outputs.extend(_observers(graph, value))
    for value in original:
        graph.outputs.remove(value)
    session = Session(to_bytes(tidy(observed)), "calibrate")
    names = [str(value.name) for value in tensors]
    lows, highs = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    samples: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for feeds in batches:
        got = iter(session.run(feeds))
        for name in names:
            lows[name] = _worst(min, lows[name], next(got))
            highs[name] = _worst(max, highs[name], next(got))
            samples[name].append(next(got))
    return {
        name: ActivationStats(low=lows[name], high=highs[name], sample=_thin(np.concatenate(samples[name])))
        for name in names
    }


def _observers(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
    """Minimum, maximum and an evenly spaced sample of `value`, as new outputs."""
    rest = constant(graph, "observe.flat", np.array([-1], np.int64))
    start, end, axis, step = (
        constant(graph, f"observe.{name}", np.array([number], np.int64))
        for name, number in (("start", 0), ("end", np.iinfo(np.int64).max), ("axis", 0), ("step", _STRIDE))
    )
    made = [
        ir.node("ReduceMin", [value], attributes={"keepdims": 0}),
        ir.node("ReduceMax", [value], attributes={"keepdims": 0}),
        ir.node("Reshape", [value, rest]),
    ]
    made.append(ir.node("Slice", [made[2].outputs[0], start, end, axis, step]))
    for node, what in zip(made, ("low", "high", "flat", "sample"), strict=True):
        node.name = node.outputs[0].name = f"{value.name}.{what}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, made)
    else:
        graph.insert_before(graph[0], made)
    return [made[0].outputs[0], made[1].outputs[0], made[3].outputs[0]]


def _worst(pick: Callable[[float, float], float], known: float, seen: NDArray[np.float32]) -> float:
    value = float(seen)
    return value if np.isnan(value) or np.isnan(known) else pick(known, value)


def _thin(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    return sample[:: max(1, len(sample) // _SAMPLES)]

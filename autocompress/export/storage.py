"""How weights lie in the file: 4-bit, sparse and float16 forms that the runtime decodes once, while it loads.

A decoder is a few standard ONNX nodes on constants. Constant folding runs them when the session is made, so that the
kernels see plain int8 or float32 weights: the file is smaller and the speed is that of the plain form. None of these
forms makes anything faster.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.export.graph import constant, insert


def store_integers(graph: ir.Graph, before: ir.Node, name: str, q: NDArray[np.int8], bits: int) -> ir.Value:
    """An int8 value from the smallest storage: sparse where that has fewer bytes, int4 for up to 4 bits, else int8."""
    dense_bytes = q.size * (0.5 if bits <= 4 else 1)
    if (positions := _positions(q)).size * 2 < dense_bytes:
        return _sparse(graph, before, name, q, positions)
    if bits <= 4:
        packed = constant(graph, f"{name}.int4", ir.tensor(q.astype(ml_dtypes.int4), dtype=ir.DataType.INT4))
        return insert(graph, before, "Cast", [packed], f"{name}.unpacked", to=ir.DataType.INT8.value)
    return constant(graph, f"{name}.int8", q)


def store_floats(graph: ir.Graph, before: ir.Node, name: str, w: NDArray[np.float32], bits: int) -> ir.Value:
    """A float32 value, stored as float16 where `bits` is 16, sparse where that has fewer bytes."""
    if (positions := _positions(w)).size * 5 < w.size * (4 if bits == 32 else 2):
        return _sparse(graph, before, name, w, positions)
    if bits == 16:
        half = constant(graph, f"{name}.float16", w.astype(np.float16))
        return insert(graph, before, "Cast", [half], f"{name}.widened", to=ir.DataType.FLOAT.value)
    return constant(graph, f"{name}.float32", w)


def store_scaled(
    graph: ir.Graph, before: ir.Node, name: str, q: NDArray[np.int8], scale: NDArray[np.float32], axis: int, bits: int
) -> ir.Value:
    """A float32 value stored as integers of `bits` bits and a scale per channel: weight-only quantization."""
    integers = store_integers(graph, before, name, q, bits)
    widened = insert(graph, before, "Cast", [integers], f"{name}.as_float", to=ir.DataType.FLOAT.value)
    shape = [1] * q.ndim
    shape[axis] = -1
    factors = constant(graph, f"{name}.scale", scale.reshape(shape))
    return insert(graph, before, "Mul", [widened, factors], f"{name}.scaled")


def _positions(array: NDArray[np.generic]) -> NDArray[np.int64]:
    """Flat places of the non-zero values, and one every 255 places, so that gaps fit a byte."""
    places = np.flatnonzero(array)
    stops = np.arange(-1, array.size, 255)[1:]
    return np.union1d(places, stops) if np.diff(places, prepend=-1).max(initial=0) > 255 else places


def _sparse(
    graph: ir.Graph, before: ir.Node, name: str, array: NDArray[np.generic], positions: NDArray[np.int64]
) -> ir.Value:
    """Values and the gaps between them (a byte each), scattered into zeros at load."""
    gaps = constant(graph, f"{name}.gaps", np.diff(positions, prepend=-1).astype(np.uint8))
    values = constant(graph, f"{name}.values", array.reshape(-1)[positions])
    first = constant(graph, f"{name}.axis", np.array(0, np.int64))
    one = constant(graph, f"{name}.one", np.array(1, np.int64))
    size = constant(graph, f"{name}.size", np.array([array.size], np.int64))
    shape = constant(graph, f"{name}.shape", np.array(array.shape, np.int64))
    wide = insert(graph, before, "Cast", [gaps], f"{name}.gaps_int64", to=ir.DataType.INT64.value)
    ends = insert(graph, before, "CumSum", [wide, first], f"{name}.ends")
    places = insert(graph, before, "Sub", [ends, one], f"{name}.places")
    zeros = ir.node(
        "ConstantOfShape",
        [size],
        attributes={"value": ir.tensor(np.zeros(1, array.dtype))},
        outputs=[ir.Value(name=f"{name}.zeros")],
        name=f"{name}.zeros",
    )
    graph.insert_before(before, zeros)
    flat = insert(graph, before, "ScatterElements", [zeros.outputs[0], places, values], f"{name}.flat", axis=0)
    return insert(graph, before, "Reshape", [flat, shape], f"{name}.dense")

"""How weights lie in the file: packed, sparse, float16 and codebook forms that the runtime decodes once, at load.

A decoder is a few standard ONNX nodes on constants. Constant folding runs them when the session is made, so that the
kernels see plain int8 or float32 weights: the file is smaller and the speed is that of the plain form. None of these
forms makes anything faster. Division and remainder unpack what has no type of its own: OpenVINO folds them, and leaves
shifts and bitwise operators in the graph.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.export.graph import constant, insert

_WORD = 31  # bits of an int32 that is never negative
_UNPACKING = (
    1000  # bytes that the nodes of `_unpacked` take in the file, measured at names of 20 characters: 700 to 1060
)


def store_integers(graph: ir.Graph, before: ir.Node, name: str, q: NDArray[np.int8], bits: int) -> ir.Value:
    """An int8 value of magnitudes below 2^(bits−1) from the smallest storage: sparse, packed, int4 or int8."""
    places = _positions(q)
    if len(places) * (1 + _bytes_each(bits)) < q.size * _bytes_each(bits):
        return _sparse(graph, before, name, _integers(graph, before, name, q.reshape(-1)[places], bits), q, places)
    return _integers(graph, before, name, q, bits)


def store_floats(graph: ir.Graph, before: ir.Node, name: str, w: NDArray[np.float32], bits: int) -> ir.Value:
    """A float32 value, stored as float16 where `bits` is 16, sparse where that has fewer bytes."""
    places = _positions(w)
    if len(places) * 5 < w.size * (4 if bits == 32 else 2):
        values = constant(graph, f"{name}.values", w.reshape(-1)[places])
        return _sparse(graph, before, name, values, w, places)
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


def store_codebook(
    graph: ir.Graph, before: ir.Node, name: str, indices: NDArray[np.uint8], table: NDArray[Any]
) -> ir.Value:
    """A value of the table's type, stored as the table and an index into it for each weight."""
    bits = max(1, (len(table) - 1).bit_length())
    first = int(np.argmin(np.abs(table)))  # zero, where there is one: the value that a sparse form leaves out
    order = np.concatenate([[first], np.delete(np.arange(len(table)), first)])
    indices = np.argsort(order).astype(np.uint8)[indices]
    values = constant(graph, f"{name}.codebook", np.ascontiguousarray(table[order]))
    places = _positions(indices)
    if len(places) * (1 + _bytes_each(bits)) < indices.size * _bytes_each(bits):
        left = _unsigned(graph, before, name, indices.reshape(-1)[places], bits)
        which = _sparse(graph, before, name, left, indices.astype(np.int32), places)
    else:
        which = _unsigned(graph, before, name, indices, bits)
    return insert(graph, before, "Gather", [values, which], f"{name}.looked_up", axis=0)


def _integers(graph: ir.Graph, before: ir.Node, name: str, q: NDArray[np.int8], bits: int) -> ir.Value:
    """An int8 value, dense."""
    if _packs(q.size, bits):
        offset = 2 ** (bits - 1) - 1
        unsigned = _unpacked(graph, before, name, (q + offset).astype(np.uint8), bits)
        middle = _shared(graph, f"unpack{bits}.middle", np.array(offset, np.int32))
        signed = insert(graph, before, "Sub", [unsigned, middle], f"{name}.signed")
        return insert(graph, before, "Cast", [signed], f"{name}.int8", to=ir.DataType.INT8.value)
    if bits <= 4:
        packed = constant(graph, f"{name}.int4", ir.tensor(q.astype(ml_dtypes.int4), dtype=ir.DataType.INT4))
        return insert(graph, before, "Cast", [packed], f"{name}.unpacked", to=ir.DataType.INT8.value)
    return constant(graph, f"{name}.int8", q)


def _unsigned(graph: ir.Graph, before: ir.Node, name: str, u: NDArray[np.uint8], bits: int) -> ir.Value:
    """An int32 value, dense."""
    if _packs(u.size, bits):
        return _unpacked(graph, before, name, u, bits)
    if bits <= 4:
        stored = constant(graph, f"{name}.uint4", ir.tensor(u.astype(ml_dtypes.uint4), dtype=ir.DataType.UINT4))
    else:
        stored = constant(graph, f"{name}.uint8", u)
    return insert(graph, before, "Cast", [stored], f"{name}.indices", to=ir.DataType.INT32.value)


def _packs(size: int, bits: int) -> bool:
    return 4 * -(-size // (_WORD // bits)) + _UNPACKING < size * (0.5 if bits <= 4 else 1)


def _bytes_each(bits: int) -> float:
    return min(4 / (_WORD // bits), 0.5 if bits <= 4 else 1)


def _unpacked(graph: ir.Graph, before: ir.Node, name: str, u: NDArray[np.uint8], bits: int) -> ir.Value:
    """An int32 value from words that hold as many numbers of so many bits as fit."""
    each = _WORD // bits
    powers = 2 ** (bits * np.arange(each, dtype=np.int32))
    padded = np.zeros((-(-u.size // each), each), np.int32)
    padded.reshape(-1)[: u.size] = u.reshape(-1)
    words = constant(graph, f"{name}.packed{bits}", (padded * powers).sum(1, dtype=np.int32)[:, None])
    shifted = insert(graph, before, "Div", [words, _shared(graph, f"unpack{bits}.powers", powers)], f"{name}.shifted")
    base = _shared(graph, f"unpack{bits}.base", np.array(2**bits, np.int32))
    digits = insert(graph, before, "Mod", [shifted, base], f"{name}.digits")
    rest, start = _shared(graph, "unpack.rest", np.array([-1])), _shared(graph, "unpack.start", np.array([0]))
    flat = insert(graph, before, "Reshape", [digits, rest], f"{name}.padded")
    if u.size % each:
        size = _shared(graph, f"unpack.size{u.size}", np.array([u.size]))
        flat = insert(graph, before, "Slice", [flat, start, size], f"{name}.numbers")
    shape = _shared(graph, f"unpack.shape{'x'.join(map(str, u.shape))}", np.array(u.shape, np.int64))
    return insert(graph, before, "Reshape", [flat, shape], f"{name}.unpacked")


def _shared(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A constant that all who name it so have in common."""
    return graph.initializers[name] if name in graph.initializers else constant(graph, name, array)


def _positions(array: NDArray[np.generic]) -> NDArray[np.int64]:
    """Flat places of the non-zero values, and one every 255 places, so that gaps fit a byte."""
    places = np.flatnonzero(array)
    stops = np.arange(-1, array.size, 255)[1:]
    return np.union1d(places, stops) if np.diff(places, prepend=-1).max(initial=0) > 255 else places


def _sparse(
    graph: ir.Graph,
    before: ir.Node,
    name: str,
    values: ir.Value,
    array: NDArray[np.generic],
    positions: NDArray[np.int64],
) -> ir.Value:
    """`values` of `array` and the gaps between them (a byte each), scattered into zeros at load."""
    gaps = constant(graph, f"{name}.gaps", np.diff(positions, prepend=-1).astype(np.uint8))
    first = _shared(graph, "sparse.axis", np.array(0, np.int64))
    one = _shared(graph, "sparse.one", np.array(1, np.int64))
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

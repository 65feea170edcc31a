"""How weights lie in the file: packed, sparse, float16 and codebook forms that the runtime decodes once, at load.

A decoder is a few standard ONNX nodes on constants. Constant folding runs them when the session is made, so that the
kernels see plain int8 or float32 weights: the file is smaller and the speed is that of the plain form. None of these
forms makes anything faster. Division and remainder unpack what has no type of its own: OpenVINO folds them, and leaves
shifts and bitwise operators in the graph. Nor does it fold CumSum, of which the sparse forms are made: in float layers
it computes them once, layers on integers it then ran in float, at 1.8 times the latency.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.export.graph import constant, insert

_WORD = 31  # bits of an int32 that is never negative
# Bytes that the nodes of a decoder take in the file, measured at names of 20 characters.
_UNPACKING, _BY_GAPS, _BY_MASK = 1000, 900, 1500

Form = Callable[[NDArray[Any]], ir.Value]


def store_integers(
    graph: ir.Graph, before: ir.Node, name: str, q: NDArray[np.int8], bits: int, *, sparse: bool = True
) -> ir.Value:
    """An int8 value of magnitudes below 2^(bits−1) from the smallest storage: sparse, packed, int4 or int8."""

    def dense(some: NDArray[Any]) -> ir.Value:
        return _integers(graph, before, name, some, bits)

    return (_sparse(graph, before, name, q, _bytes_each(bits), dense) if sparse else None) or dense(q)


def store_floats(graph: ir.Graph, before: ir.Node, name: str, w: NDArray[np.float32], bits: int) -> ir.Value:
    """A float32 value, stored as float16 where `bits` is 16, sparse where that has fewer bytes."""

    def dense(some: NDArray[Any]) -> ir.Value:
        if bits == 16:
            half = constant(graph, f"{name}.float16", some.astype(np.float16))
            return insert(graph, before, "Cast", [half], f"{name}.widened", to=ir.DataType.FLOAT.value)
        return constant(graph, f"{name}.float32", some)

    return _sparse(graph, before, name, w, bits / 8, dense) or dense(w)


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
    graph: ir.Graph,
    before: ir.Node,
    name: str,
    indices: NDArray[np.uint8],
    table: NDArray[Any],
    *,
    sparse: bool = True,
) -> ir.Value:
    """A value of the table's type, stored as the table and an index into it for each weight."""
    bits = max(1, (len(table) - 1).bit_length())
    first = int(np.argmin(np.abs(table)))  # zero, where there is one: the value that a sparse form leaves out
    order = np.concatenate([[first], np.delete(np.arange(len(table)), first)])
    indices = np.argsort(order).astype(np.uint8)[indices]
    values = constant(graph, f"{name}.codebook", np.ascontiguousarray(table[order]))

    def dense(some: NDArray[Any]) -> ir.Value:
        return _unsigned(graph, before, name, some, bits)

    which = (_sparse(graph, before, name, indices, _bytes_each(bits), dense) if sparse else None) or dense(indices)
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
    if u.size % each:
        digits = _shaped(graph, before, f"{name}.padded", digits, (-1,))
        start, size = (_shared(graph, f"place{n}", np.array([n])) for n in (0, u.size))
        digits = insert(graph, before, "Slice", [digits, start, size], f"{name}.numbers")
    return _shaped(graph, before, f"{name}.unpacked", digits, u.shape)


def _shaped(graph: ir.Graph, before: ir.Node, name: str, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    wanted = _shared(graph, f"shape{'x'.join(map(str, shape))}", np.array(shape, np.int64))
    return insert(graph, before, "Reshape", [value, wanted], name)


def _shared(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A constant that all who name it so have in common."""
    return graph.initializers[name] if name in graph.initializers else constant(graph, name, array)


def _sparse(
    graph: ir.Graph, before: ir.Node, name: str, array: NDArray[Any], bytes_each: float, dense: Form
) -> ir.Value | None:
    """A value of which only what is not zero is stored, in the `dense` form, and where it is; None if that is larger.

    Where: by gaps of a byte each, or by a bit for every element.
    """
    places, count = _positions(array), np.count_nonzero(array)
    gaps = len(places) * (1 + bytes_each) + _BY_GAPS
    mask = array.size * _bytes_each(1) + count * bytes_each + _BY_MASK
    if min(gaps, mask) >= array.size * bytes_each:
        return None
    if gaps <= mask:
        return _by_gaps(graph, before, name, array, places, dense(array.reshape(-1)[places]))
    return _by_mask(graph, before, name, array, dense)


def _positions(array: NDArray[Any]) -> NDArray[np.int64]:
    """Flat places of the non-zero values, and one every 255 places, so that gaps fit a byte."""
    places = np.flatnonzero(array)
    stops = np.arange(-1, array.size, 255)[1:]
    return np.union1d(places, stops) if np.diff(places, prepend=-1).max(initial=0) > 255 else places


def _by_mask(graph: ir.Graph, before: ir.Node, name: str, array: NDArray[Any], dense: Form) -> ir.Value:
    """The elements that are not zero, looked up by how many of them there are up to each place."""
    there = array.reshape(-1) != 0
    values = dense(np.concatenate([np.zeros(1, array.dtype), array.reshape(-1)[there]]))
    mask = _unpacked(graph, before, f"{name}.mask", there.astype(np.uint8), 1)
    first = _shared(graph, "sparse.axis", np.array(0, np.int64))
    counted = insert(graph, before, "CumSum", [mask, first], f"{name}.counted")
    flat = insert(graph, before, "Mul", [counted, mask], f"{name}.places")
    places = _shaped(graph, before, f"{name}.which", flat, array.shape)
    return insert(graph, before, "Gather", [values, places], f"{name}.dense", axis=0)


def _by_gaps(
    graph: ir.Graph, before: ir.Node, name: str, array: NDArray[Any], positions: NDArray[np.int64], values: ir.Value
) -> ir.Value:
    """`values` and the gaps between them, scattered into zeros."""
    gaps = constant(graph, f"{name}.gaps", np.diff(positions, prepend=-1).astype(np.uint8))
    first = _shared(graph, "sparse.axis", np.array(0, np.int64))
    one = _shared(graph, "sparse.one", np.array(1, np.int64))
    size = _shared(graph, f"place{array.size}", np.array([array.size]))
    wide = insert(graph, before, "Cast", [gaps], f"{name}.gaps_int64", to=ir.DataType.INT64.value)
    ends = insert(graph, before, "CumSum", [wide, first], f"{name}.ends")
    places = insert(graph, before, "Sub", [ends, one], f"{name}.places")
    zeros = ir.node(
        "ConstantOfShape",
        [size],
        attributes={"value": ir.tensor(np.zeros(1, np.int32 if array.dtype == np.uint8 else array.dtype))},
        outputs=[ir.Value(name=f"{name}.zeros")],
        name=f"{name}.zeros",
    )
    graph.insert_before(before, zeros)
    flat = insert(graph, before, "ScatterElements", [zeros.outputs[0], places, values], f"{name}.flat", axis=0)
    return _shaped(graph, before, f"{name}.dense", flat, array.shape)

"""Weights of a graph's layers as integers, as values of a codebook, or as floats in a smaller form of storage."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.cluster import codebook
from autocompress.compress.quantize import quantize_weight
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.export.graph import array_of, constant, insert
from autocompress.export.storage import store_codebook, store_floats, store_integers, store_scaled

Scales = NDArray[np.float32]
_OFF_GRID = 0.02  # of a step; folding a BatchNorm of scale one moves a weight by 1e-7 of itself
_SMALLEST_SCALE = 1e-9  # a channel of zeros would divide by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the integer kernels of a device take.

    Attributes:
        bits: most bits of the integers that stand for the values of a codebook.
        sparse: whether zeros may be left out of the file: the runtime puts them back while it loads.
    """

    bits: int = 8
    sparse: bool = True


def round_weight(
    weight: NDArray[np.float32], bits: int, axis: int, learned: Scales | None
) -> tuple[NDArray[np.int8], Scales]:
    """Integers and a scale for each index of `axis`: exactly what was learned where the weights lie on that grid."""
    q = None if learned is None else on_grid(weight, bits, axis, learned)
    if q is None or learned is None:
        return quantize_weight(weight, bits, axis)
    return q, np.maximum(learned, _SMALLEST_SCALE).astype(np.float32)


def on_grid(weight: NDArray[np.float32], bits: int, axis: int, scale: Scales) -> NDArray[np.int8] | None:
    """The integers of `bits` bits that weights are multiples of `scale` by, along `axis`; None where they are not."""
    if scale.shape != (weight.shape[axis],):
        return None
    exact = weight / _along(np.maximum(scale, _SMALLEST_SCALE), weight.ndim, axis)
    q = np.rint(exact)
    if np.abs(q).max(initial=0) >= 2 ** (bits - 1) or np.abs(exact - q).max(initial=0) > _OFF_GRID:
        return None
    integers: NDArray[np.int8] = q.astype(np.int8)
    return integers


def put_integers(
    graph: ir.Graph,
    node: ir.Node,
    choice: LayerChoice,
    input_scale: float,
    learned: Scales | None,
    kernels: Kernels,
) -> None:
    """Weight and bias of an integer layer become integers with DequantizeLinear."""
    weight, axis = weight_of(node)
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    # An (almost) all-zero channel has a scale so small that its bias would leave int32.
    least = np.zeros(weight.shape[axis], np.float32)
    if bias is not None:
        least = np.abs(bias).astype(np.float32) / np.float32(input_scale * 2.0**30)
    if choice.levels == "uniform":
        integers, scale = _even_integers(graph, node, choice.weight_bits, learned, least, kernels)
    else:
        integers, scale = _coded_integers(graph, node, choice, least, kernels)
    name = str(node.name)
    scales = constant(graph, f"{name}.weight_scale", scale)
    zeros = constant(graph, f"{name}.weight_zero_point", np.zeros(len(scale), np.int8))
    rounded = insert(graph, node, "DequantizeLinear", [integers, scales, zeros], f"{name}.weight_dq", axis=axis)
    node.replace_input_with(1, rounded)
    if bias is not None:
        step = scale.astype(np.float64) * input_scale
        q_bias = constant(graph, f"{name}.bias_int32", np.rint(bias.astype(np.float64) / step).astype(np.int32))
        steps = constant(graph, f"{name}.bias_scale", step.astype(np.float32))
        zeros32 = constant(graph, f"{name}.bias_zero_point", np.zeros(len(scale), np.int32))
        node.replace_input_with(
            2, insert(graph, node, "DequantizeLinear", [q_bias, steps, zeros32], f"{name}.bias_dq", axis=0)
        )


def put_floats(graph: ir.Graph, node: ir.Node, choice: LayerChoice, learned: Scales | None) -> None:
    """A layer that runs in float: its weight in a smaller form of storage."""
    weight, axis = weight_of(node)
    name = str(node.name)
    if choice.levels != "uniform":
        value = store_codebook(graph, node, name, *codebook(weight, choice.weight_bits, choice.levels))
    elif choice.weight_bits <= 8:
        q, scale = round_weight(weight, choice.weight_bits, axis, learned)
        value = store_scaled(graph, node, name, q, scale, axis, choice.weight_bits)
    else:
        value = store_floats(graph, node, name, weight, choice.weight_bits)
    node.replace_input_with(0 if node.op_type == "Gather" else 1, value)


def _even_integers(
    graph: ir.Graph, node: ir.Node, bits: int, learned: Scales | None, least: Scales, kernels: Kernels
) -> tuple[ir.Value, Scales]:
    weight, axis = weight_of(node)
    q, scale = round_weight(weight, bits, axis, learned)
    if (scale < least).any():
        scale, top = np.maximum(scale, least), 2 ** (bits - 1) - 1
        q = np.clip(np.rint(weight / _along(scale, weight.ndim, axis)), -top, top).astype(np.int8)
    return store_integers(graph, node, str(node.name), q, bits, sparse=kernels.sparse), scale


def _coded_integers(
    graph: ir.Graph, node: ir.Node, choice: LayerChoice, least: Scales, kernels: Kernels
) -> tuple[ir.Value, Scales]:
    weight, axis = weight_of(node)
    indices, table = codebook(weight, choice.weight_bits, choice.levels)
    largest, top = float(np.abs(table).max()), 2 ** (kernels.bits - 1) - 1
    counts = np.bincount(indices.reshape(-1), minlength=len(table))
    # The largest integer that stands for the largest value: 32 or 64 where the values are powers of two.
    scales = [max(largest / t, _SMALLEST_SCALE) for t in range(top // 2 + 1, top + 1)]
    errors = [float((counts * (np.rint(table / s) * s - table) ** 2).sum()) for s in scales]
    scale = max(scales[int(np.argmin(errors))], float(least.max()))
    rounded = np.rint(table / scale).astype(np.int8)
    integers = store_codebook(graph, node, str(node.name), indices, rounded, sparse=kernels.sparse)
    return integers, np.full(weight.shape[axis], scale, np.float32)


def weight_of(node: ir.Node) -> tuple[NDArray[np.float32], int]:
    """The weight of a layer's node and the axis of its output channels (for an embedding: of its rows)."""
    array = array_of(node.inputs[0 if node.op_type == "Gather" else 1])
    if array is None:
        raise StageError("export", f"the weight of {node.name!r} is not a constant of the graph")
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    axis = 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed) else 0
    return np.asarray(array, np.float32), axis


def _along(values: Scales, ndim: int, axis: int) -> Scales:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)

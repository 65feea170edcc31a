"""Weights of a graph's layers as integers, as values of a codebook, or as floats in a smaller form of storage."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.quantize import quantize_weight
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError
from autocompress.export.graph import array_of, constant, insert
from autocompress.export.storage import store_floats, store_integers, store_scaled

Scales = NDArray[np.float32]
_OFF_GRID = 0.02  # of a step; folding a BatchNorm of scale one moves a weight by 1e-7 of itself
_SMALLEST_SCALE = 1e-9  # a channel of zeros would divide by zero


def round_weight(
    weight: NDArray[np.float32], bits: int, axis: int, learned: Scales | None
) -> tuple[NDArray[np.int8], Scales]:
    """Integers and a scale for each index of `axis`: exactly what was learned where the weights lie on that grid."""
    if learned is not None and learned.shape == (weight.shape[axis],):
        scale = np.maximum(learned, _SMALLEST_SCALE).astype(np.float32)
        exact = weight / _along(scale, weight.ndim, axis)
        q = np.rint(exact)
        if np.abs(q).max(initial=0) < 2 ** (bits - 1) and np.abs(exact - q).max(initial=0) < _OFF_GRID:
            return q.astype(np.int8), scale
    return quantize_weight(weight, bits, axis)


def put_integers(
    graph: ir.Graph, node: ir.Node, choice: LayerChoice, input_scale: float, learned: Scales | None
) -> None:
    """Weight and bias of an integer layer become integers with DequantizeLinear."""
    weight, axis = weight_of(node)
    q, scale = round_weight(weight, choice.weight_bits, axis, learned)
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        # An (almost) all-zero channel has a scale so small that its bias would leave int32.
        least = np.abs(bias).astype(np.float32) / (input_scale * 2.0**30)
        if (scale < least).any():
            scale = np.maximum(scale, least).astype(np.float32)
            top = 2 ** (choice.weight_bits - 1) - 1
            q = np.clip(np.rint(weight / _along(scale, weight.ndim, axis)), -top, top).astype(np.int8)
    name = str(node.name)
    integers = store_integers(graph, node, name, q, choice.weight_bits)
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
    if choice.weight_bits <= 8:
        q, scale = round_weight(weight, choice.weight_bits, axis, learned)
        value = store_scaled(graph, node, name, q, scale, axis, choice.weight_bits)
    else:
        value = store_floats(graph, node, name, weight, choice.weight_bits)
    node.replace_input_with(0 if node.op_type == "Gather" else 1, value)


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

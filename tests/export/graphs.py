"""Small float graphs by hand, for what no network above has."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from autocompress.compress.quantize import ActivationStats


def graph_of(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, np.ndarray],
    shape: Sequence[int | None],
    *,
    rank: int | None = None,
    integers: bool = False,
) -> ir.Model:
    """A model from `input` of this shape to `output`, which has as many axes unless `rank` says otherwise."""
    kind = TensorProto.INT64 if integers else TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * (rank or len(shape)))],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def linear(weight: np.ndarray, bias: np.ndarray | None = None, *, rectified: bool = False) -> ir.Model:
    """output = input · weightᵀ + bias: one Gemm named `fc`, with a Relu behind it where wanted."""
    inputs = ["input", "w"] + ([] if bias is None else ["b"])
    nodes = [helper.make_node("Gemm", inputs, ["sum" if rectified else "output"], name="fc", transB=1)]
    if rectified:
        nodes.append(helper.make_node("Relu", ["sum"], ["output"], name="relu"))
    return graph_of(nodes, {"w": weight} | ({} if bias is None else {"b": bias}), [None, weight.shape[1]])


def conv(weight: np.ndarray, bias: np.ndarray) -> ir.Model:
    """One Conv named `conv` from `input` to `output`."""
    node = helper.make_node("Conv", ["input", "w", "b"], ["output"], name="conv", pads=[1, 1, 1, 1])
    return graph_of([node], {"w": weight, "b": bias}, [None, weight.shape[1], 8, 8])


def table(weight: np.ndarray) -> ir.Model:
    """Rows of a table: one Gather named `table`."""
    node = helper.make_node("Gather", ["w", "input"], ["output"], name="table")
    return graph_of([node], {"w": weight}, [None, 5], rank=3, integers=True)


def seen(*values: np.ndarray, names: Sequence[str] = ("input", "output")) -> dict[str, ActivationStats]:
    """Statistics of these tensors."""
    return {
        name: ActivationStats(low=float(v.min()), high=float(v.max()), sample=v.reshape(-1).astype(np.float32))
        for name, v in zip(names, values, strict=True)
    }


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded normal noise."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

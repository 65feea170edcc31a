"""The arithmetic of a graph's floats, written into the file: float32 becomes float16 or bfloat16 throughout."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.core.candidate import FloatPrecision
from autocompress.core.errors import StageError
from autocompress.export.graph import array_of, constant

TYPES: Mapping[FloatPrecision, np.dtype[np.generic]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_LARGEST: Mapping[FloatPrecision, float] = {"fp32": 3.4e38, "fp16": 65504.0, "bf16": 3.38e38}
_SMALLEST_SCALE: Mapping[FloatPrecision, float] = {"fp32": 1e-9, "fp16": 2.0**-24, "bf16": 1e-9}
_BFLOAT16_OPSET = 22  # the first in which Conv and the pools take bfloat16
_STAYS = {"Resize": (1, 2)}  # inputs that are float32 whatever the data is


def rounded(values: NDArray[np.generic], precision: FloatPrecision) -> NDArray[np.float32]:
    """`values` as the precision holds them: its nearest number, the largest finite one for what is beyond."""
    top = _LARGEST[precision]
    return np.clip(np.asarray(values, np.float64), -top, top).astype(TYPES[precision]).astype(np.float32)


def positive(scales: NDArray[np.generic], precision: FloatPrecision) -> NDArray[np.float32]:
    """Scales as the precision holds them, none of which is zero."""
    return rounded(np.maximum(np.asarray(scales, np.float64), _SMALLEST_SCALE[precision]), precision)


def cast_floats(model: ir.Model, precision: FloatPrecision) -> ir.Model:
    """Compute in `precision` what `model` computes in float32, in place; its inputs and outputs stay as they are.

    A strongly typed TensorRT network runs each node in the type the file gives it; there is no other way to ask.

    Raises:
        StageError: the graph has branches or loops, whose bodies are left alone here.
    """
    if precision == "fp32":
        return model
    graph = model.graph
    if any(isinstance(a.value, ir.Graph) for node in graph for a in node.attributes.values()):
        raise StageError("export", f"a graph with branches or loops cannot be computed in {precision}")
    nodes = list(graph)
    kind = ir.DataType.from_numpy(TYPES[precision])
    _cast_constants(graph, precision)
    for node in nodes:
        _cast_attributes(node, kind)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            uses = [(use.node, use.idx) for use in value.uses()]
            narrow = ir.node("Cast", [value], {"to": kind}, name=f"{value.name}.{precision}")
            narrow.outputs[0].name = narrow.name
            graph.insert_before(graph[0], narrow)
            for node, index in uses:
                node.replace_input_with(index, narrow.outputs[0])
    for i, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            _widen_output(graph, i, value, precision)
    if precision == "bf16":
        graph.opset_imports[""] = max(_BFLOAT16_OPSET, graph.opset_imports[""])
    return model


def _cast_constants(graph: ir.Graph, precision: FloatPrecision) -> None:
    for value in list(graph.initializers.values()):
        array = array_of(value)
        if array is None or array.dtype != np.float32 or value.is_graph_output():
            continue
        uses = [(use.node, use.idx) for use in value.uses()]
        changing = [(node, index) for node, index in uses if index not in _STAYS.get(node.op_type, ())]
        if not changing:
            continue
        narrow = constant(graph, f"{value.name}.{precision}", rounded(array, precision).astype(TYPES[precision]))
        for node, index in changing:
            node.replace_input_with(index, narrow)


def _cast_attributes(node: ir.Node, kind: ir.DataType) -> None:
    """Types that a node names itself."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", kind.value)
    elif node.op_type == "ConstantOfShape":
        filling = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, "f4")
        if filling.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(filling.astype(kind.numpy())))


def _widen_output(graph: ir.Graph, index: int, value: ir.Value, precision: FloatPrecision) -> None:
    widen = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.fp32")
    wide = widen.outputs[0]
    wide.name, value.name = value.name, f"{value.name}.{precision}"
    wide.shape, wide.type = value.shape, value.type
    value.shape = value.type = None
    graph.append(widen)
    graph.outputs[index] = wide

"""Small verbs on an ONNX graph (onnx-ir), used by all that edits one."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass, TopologicalSortPass

from autocompress.core.artifact import TensorSpec

OPSET = 21  # the first with 4-bit integers
IR_VERSION = 10


def constant(graph: ir.Graph, name: str, array: NDArray[Any] | np.generic | ir.TensorProtocol) -> ir.Value:
    """A new initialiser; `name` is made unique."""
    tensor = ir.Tensor(np.asarray(array)) if isinstance(array, np.ndarray | np.generic) else array
    unique, n = name, 1
    while unique in graph.initializers:
        unique, n = f"{name}_{n}", n + 1
    value = ir.Value(
        name=unique, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def array_of(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The value of an initialiser, None for anything that is computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy())


def insert(
    graph: ir.Graph, before: ir.Node, op: str, inputs: list[ir.Value | None], name: str, **attributes: int
) -> ir.Value:
    """Insert a node of one output in front of `before`; the output is called `name`."""
    node = ir.node(op, inputs, attributes=attributes, outputs=[ir.Value(name=name)], name=name)
    graph.insert_before(before, node)
    return node.outputs[0]


def remove(graph: ir.Graph, node: ir.Node, replacement: ir.Value) -> None:
    """Take a node of one output away; who read it reads `replacement`."""
    output = node.outputs[0]
    if output.is_graph_output():
        name = output.name
        output.name = f"{name}_removed"
        replacement.name = name
        replacement.shape, replacement.type = output.shape, output.type
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def only_consumer(value: ir.Value | None) -> ir.Node | None:
    """The one node that reads `value`, None if several do, none does, or it is an output of the graph."""
    if value is None or value.is_graph_output():
        return None
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 else None


def tidy(model: ir.Model) -> ir.Model:
    """Drop what nothing reads, and shapes. What inserts nodes keeps their order: it is not sorted again."""
    RemoveUnusedNodesPass()(model)
    computed = (value for node in model.graph for value in node.outputs if not value.is_graph_output())
    for value in (*model.graph.initializers.values(), *computed):
        value.shape = value.type = None  # known from the constant, or inferred; in the file it is dead weight
    return model


def forget_tracing(model: ir.Model) -> ir.Model:
    """Sort the nodes, and drop what tracing noted at them."""
    TopologicalSortPass()(model)
    ClearMetadataAndDocStringPass()(model)
    return tidy(model)


def to_bytes(model: ir.Model) -> bytes:
    """The model as a file's bytes."""
    return bytes(ir.to_proto(model).SerializeToString())


def specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as TensorSpecs; a symbolic size is None."""
    found = []
    for value in values:
        shape = () if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
        dtype = "float32" if value.dtype is None else str(value.dtype.numpy())
        found.append(TensorSpec(name=str(value.name), dtype=dtype, shape=shape))
    return tuple(found)

"""The ONNX template of a topology: exported once, its weights exchanged for every candidate.

torch.export takes seconds; exchanging initialisers takes milliseconds. The template keeps each parameter under its
torch name, unfolded, so that any cut or trained copy of the model fits in by name. BatchNorm is folded and weights
are transposed afterwards, on the copy.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule
from torch import nn

from autocompress.core.errors import TaskError
from autocompress.export.graph import IR_VERSION, OPSET, array_of, constant, forget_tracing, only_consumer, remove, tidy


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A graph whose weights are open inputs, by torch name.

    Attributes:
        graph: the model without weights.
        names: torch names of all parameters and buffers of the model.
        weights: those of the open inputs.
        nodes: for each layer that one node computes, the name of that node.
        unmapped: for each other layer, why it is not one node.
        dynamic_batch: whether the first axis of every input is free.
    """

    graph: ir.Model
    names: frozenset[str]
    weights: tuple[str, ...]
    nodes: Mapping[str, str]
    unmapped: Mapping[str, str]
    dynamic_batch: bool

    def fill(self, model: nn.Module) -> ir.Model:
        """The float graph of `model`: weights in, BatchNorm folded, each layer's node named after the layer."""
        filled = self.graph.clone()
        graph = filled.graph
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        open_inputs = {value.name: value for value in graph.inputs if value.name in set(self.weights)}
        for value in open_inputs.values():
            graph.inputs.remove(value)
        for name, value in open_inputs.items():
            tensor = ir.Tensor(state[str(name)].detach().cpu().contiguous().numpy(), name=name)
            value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
            graph.register_initializer(value)
        named = {node.name: node for node in graph}
        for layer, node_name in self.nodes.items():
            node, module = named[node_name], model.get_submodule(layer)
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                node.attributes["group"] = ir.AttrInt64("group", module.groups)
            node.name = layer
        _fold_transposes(graph)
        _fold_batchnorm(graph)
        return tidy(filled)


def export_template(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    layers: Sequence[str],
    outputs: Sequence[str],
    *,
    by_keyword: bool,
) -> Template:
    """Export `model` once.

    Args:
        model: in eval mode.
        inputs: a batch of two items, by input name.
        layers: names of the layers to find in the graph.
        outputs: names of the outputs.
        by_keyword: whether the model takes its inputs by name, else in order.

    Raises:
        TaskError: torch cannot export the model.
    """
    try:
        exported = _export(model, inputs, outputs, by_keyword=by_keyword, dynamic=True)
        dynamic = all(value.shape is None or not isinstance(value.shape[0], int) for value in exported.graph.inputs)
    except Exception:  # whatever torch.export raises on a model that fixes its batch size
        dynamic = False
    if not dynamic:  # torch may also fix the size of the sample without a word
        try:
            exported = _export(model, inputs, outputs, by_keyword=by_keyword, dynamic=False)
        except Exception as error:  # whatever it raises on a model that it cannot trace at all
            raise TaskError(f"torch cannot export the model to ONNX: {_root_cause(error)}") from error
    graph = exported.graph
    known = frozenset((*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())))
    weights = [name for name in graph.initializers if name in known]
    for name in weights:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    fold_constants(exported)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(exported)
    fuse_pad_into_conv_rule.apply_to_model(exported)  # no runtime does it once integers are between the two
    _drop_zero_biases(graph)
    _free_flattened_sizes(graph)
    exported.ir_version = IR_VERSION
    forget_tracing(exported)
    nodes, unmapped = _find_layers(graph, layers)
    return Template(
        graph=exported, names=known, weights=tuple(weights), nodes=nodes, unmapped=unmapped, dynamic_batch=dynamic
    )


def _export(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], *, by_keyword: bool, dynamic: bool
) -> ir.Model:
    batch = torch.export.Dim("batch")
    values = dict(inputs) if dynamic else {name: tensor[:1] for name, tensor in inputs.items()}
    shapes: Any = {name: {0: batch} for name in values}
    args: tuple[torch.Tensor, ...] = ()
    if not by_keyword:
        args, shapes, values = tuple(values.values()), tuple(shapes.values()), {}
    with _quiet():
        program = torch.onnx.export(
            model,
            args,
            kwargs=values,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes if dynamic else None,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _root_cause(error: BaseException) -> str:
    """What the first of a chain of exceptions said, in one line: the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it speaks of packages this export has no use for, and prints graphs it cannot trace."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """A convolution without bias is traced with one of zeros, whose size would be fixed."""
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3:
            bias = array_of(node.inputs[2])
            if bias is not None and not bias.any():
                node.resize_inputs(2)


def _free_flattened_sizes(graph: ir.Graph) -> None:
    """`flatten(1)` is traced with the size spelt out: [batch, 512]. [batch, -1] says the same for every width."""
    for node in graph:
        if node.op_type != "Reshape" or (shape := node.inputs[1]) is None:
            continue
        source = shape.producer()
        if source is None or source.op_type != "Concat" or len(source.inputs) != 2:
            continue
        first, last = source.inputs
        size = _known(last)
        if _known(first) is None and size is not None and size.shape == (1,) and last is not None:
            source.replace_input_with(1, constant(graph, f"{node.name}_rest", np.array([-1], np.int64)))


def _known(value: ir.Value | None) -> NDArray[np.generic] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _find_layers(graph: ir.Graph, layers: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    inputs = {value.name: value for value in graph.inputs}
    nodes, unmapped = {}, {}
    for layer in layers:
        weight = inputs.get(f"{layer}.weight")
        node = only_consumer(weight)
        if node is not None and node.op_type == "Transpose":
            node = only_consumer(node.outputs[0])
        if node is None or node.op_type not in ("Conv", "Gemm", "MatMul", "Gather"):
            unmapped[layer] = "its weight is not read by exactly one Conv, Gemm, MatMul or Gather of the exported graph"
        else:
            nodes[layer] = str(node.name)
    return nodes, unmapped


def _fold_transposes(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        weight = node.inputs[0]
        array = array_of(weight)
        if array is None or weight is None:
            continue
        order = node.attributes["perm"].as_ints()
        folded = constant(graph, f"{weight.name}.T", np.ascontiguousarray(array.transpose(order)))
        remove(graph, node, folded)


def _fold_batchnorm(graph: ir.Graph) -> None:
    """BatchNorm after a Conv or Gemm becomes part of its weight and bias (Jacob et al., 2018, section 3.2)."""
    for node in list(graph):
        if node.op_type != "BatchNormalization" or node.inputs[0] is None:
            continue
        layer = node.inputs[0].producer()
        statistics = [array_of(value) for value in node.inputs[1:5]]
        if layer is None or layer.op_type not in ("Conv", "Gemm") or only_consumer(layer.outputs[0]) is not node:
            continue
        weight = array_of(layer.inputs[1])
        bias = array_of(layer.inputs[2]) if len(layer.inputs) > 2 else None
        if weight is None or any(s is None for s in statistics) or (bias is None and len(layer.inputs) > 2):
            continue
        if layer.op_type == "Gemm" and not _plain_gemm(layer):
            continue
        gamma, beta, mean, variance = (np.asarray(s, np.float64) for s in statistics)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        scale = gamma / np.sqrt(variance + epsilon)
        new_bias = beta - mean * scale + (0.0 if bias is None else np.asarray(bias, np.float64) * scale)
        new_weight = np.asarray(weight, np.float64) * scale.reshape(-1, *[1] * (weight.ndim - 1))
        name = layer.name
        layer.replace_input_with(1, constant(graph, f"{name}.weight_folded", new_weight.astype(np.float32)))
        layer.resize_inputs(3)
        layer.replace_input_with(2, constant(graph, f"{name}.bias_folded", new_bias.astype(np.float32)))
        remove(graph, node, layer.outputs[0])


def _plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm is x·Wᵀ + b, as torch's Linear is."""
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    return read.get("transB", 0) == 1 and not read.get("transA", 0) and read.get("alpha", 1) == read.get("beta", 1) == 1

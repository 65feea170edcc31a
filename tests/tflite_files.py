"""Small .tflite files for tests, written with the schema that LiteRT ships: no converter, no TensorFlow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import Builder
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = Sequence[int | None]

_TYPES = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
}


class Graph:
    """A model of one subgraph under construction; tensors go by their names."""

    def __init__(self) -> None:
        self._tensors: dict[str, int] = {}
        self._codes: list[int] = []
        self._model: Any = schema.ModelT()
        self._model.version, self._model.description = 3, ""
        self._model.buffers, self._model.operatorCodes = [schema.BufferT()], []
        self._graph: Any = schema.SubGraphT()
        self._graph.name, self._graph.tensors, self._graph.operators = "main", [], []

    def tensor(
        self, name: str, shape: Shape, dtype: str = "float32", *, scale: float | None = None, zero: int = 0
    ) -> str:
        """A value that is computed or fed; None in `shape` is a free size, and `scale` makes it a quantized one."""
        made: Any = schema.TensorT()
        made.name, made.type = name, getattr(schema.TensorType, _TYPES[dtype])
        made.shape = [1 if n is None else n for n in shape]
        if None in shape:  # written with the size that it has at first
            made.shapeSignature = [-1 if n is None else n for n in shape]
        if scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = [scale], [zero]
        self._tensors[name] = len(self._graph.tensors)
        self._graph.tensors.append(made)
        return name

    def constant(self, name: str, value: Array, *, scale: float | None = None) -> str:
        """A weight; with `scale`, it is stored in steps of that: int32 where it already is, else int8."""
        if scale is not None and value.dtype != np.int32:
            value = np.clip(np.round(value / scale), -127, 127).astype(np.int8)
        self.tensor(name, value.shape, value.dtype.name, scale=scale)
        buffer: Any = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self._graph.tensors[-1].buffer = len(self._model.buffers)
        self._model.buffers.append(buffer)
        return name

    def operator(self, kind: str, inputs: Sequence[str], output: str, options: str = "", **values: Any) -> str:
        """An operator by its name in the schema, with its table of options by that table's name, without "Options"."""
        code = getattr(schema.BuiltinOperator, kind)
        if code not in self._codes:
            entry: Any = schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
            self._codes.append(code)
            self._model.operatorCodes.append(entry)
        made: Any = schema.OperatorT()
        made.opcodeIndex = self._codes.index(code)
        made.inputs = [self._tensors[name] for name in inputs]
        made.outputs = [self._tensors[output]]
        if options:
            table = getattr(schema, f"{options}OptionsT")()
            for name, value in values.items():
                setattr(table, name, value)
            made.builtinOptionsType = getattr(schema.BuiltinOptions, f"{options}Options")
            made.builtinOptions = table
        self._graph.operators.append(made)
        return output

    def write(
        self, path: Path, inputs: dict[str, str], outputs: dict[str, str], *, signature: bool = True, size: int = 1
    ) -> Path:
        """The file; `inputs` and `outputs` are tensors by the names that the signature gives them, where it has one.

        Free sizes are `size` until somebody says otherwise.
        """
        for tensor in self._graph.tensors:
            if tensor.shapeSignature is not None:
                tensor.shape = [size if n < 0 else n for n in tensor.shapeSignature]
        self._graph.inputs = [self._tensors[name] for name in inputs.values()]
        self._graph.outputs = [self._tensors[name] for name in outputs.values()]
        names: Any = schema.SignatureDefT()
        names.signatureKey, names.subgraphIndex = "serving_default", 0
        names.inputs, names.outputs = self._maps(inputs), self._maps(outputs)
        self._model.signatureDefs, self._model.subgraphs = [names] if signature else [], [self._graph]
        builder = Builder(1024)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path

    def _maps(self, names: dict[str, str]) -> list[Any]:
        made = []
        for name, tensor in names.items():
            entry: Any = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, self._tensors[tensor]
            made.append(entry)
        return made


def write_linear(path: Path, weight: Array, bias: Array, batch: int | None = None, *, signature: bool = True) -> Path:
    """output = input @ weight + bias, one FULLY_CONNECTED whose output tensor is named `layers.0.fc`."""
    graph = Graph()
    graph.tensor("args_0", (batch, weight.shape[0]))
    graph.constant("w", weight.T)
    graph.constant("b", bias)
    graph.tensor("layers.0.fc", (batch, weight.shape[1]))
    graph.operator("FULLY_CONNECTED", ["args_0", "w", "b"], "layers.0.fc", "FullyConnected", keepNumDims=True)
    return graph.write(path, {"input": "args_0"}, {"output": "layers.0.fc"}, signature=signature)


MIXED_PRECISIONS = {"layers.0.conv": "int8", "layers.1.conv": "fp32", "fc": "int8", "head": "fp32", "stored": "fp32"}


def write_mixed(path: Path) -> Path:
    """input (batch, 8, 8, 3) → integer conv `layers.0.conv`, float conv `layers.1.conv`, mean, `fc` with integer
    weights and activations that are quantized as they come, float `head`, `stored` with integer weights that are
    decoded before they are used.
    """
    rng = np.random.default_rng(0)
    graph = Graph()
    graph.tensor("args_0", (None, 8, 8, 3))
    graph.tensor("q0", (None, 8, 8, 3), "int8", scale=0.05)
    graph.operator("QUANTIZE", ["args_0"], "q0")
    graph.constant("w0", rng.normal(size=(16, 3, 3, 3)), scale=0.03)
    graph.constant("b0", np.zeros(16, np.int32), scale=0.0015)
    graph.tensor("layers.0.conv", (None, 8, 8, 16), "int8", scale=0.1)
    conv = {"strideH": 1, "strideW": 1, "padding": 0}
    graph.operator("CONV_2D", ["q0", "w0", "b0"], "layers.0.conv", "Conv2D", **conv)
    graph.tensor("d0", (None, 8, 8, 16))
    graph.operator("DEQUANTIZE", ["layers.0.conv"], "d0")
    graph.constant("w1", rng.normal(size=(16, 3, 3, 16)).astype(np.float32))
    graph.constant("b1", np.zeros(16, np.float32))
    graph.tensor("layers.1.conv", (None, 8, 8, 16))
    graph.operator("CONV_2D", ["d0", "w1", "b1"], "layers.1.conv", "Conv2D", **conv)
    graph.constant("axes", np.array([1, 2], np.int32))
    graph.tensor("mean", (None, 16))
    graph.operator("MEAN", ["layers.1.conv", "axes"], "mean", "Reducer", keepDims=False)
    graph.constant("w2", rng.normal(size=(16, 16)), scale=0.03)
    graph.constant("b2", np.ones(16, np.float32))
    graph.tensor("fc", (None, 16))
    graph.operator("FULLY_CONNECTED", ["mean", "w2", "b2"], "fc", "FullyConnected")
    graph.constant("w3", rng.normal(size=(8, 16)).astype(np.float32))
    graph.tensor("head", (None, 8))
    graph.operator("FULLY_CONNECTED", ["fc", "w3"], "head", "FullyConnected")
    graph.constant("w4", rng.normal(size=(3, 8)), scale=0.03)
    graph.tensor("d4", (3, 8))
    graph.operator("DEQUANTIZE", ["w4"], "d4")
    graph.tensor("stored", (None, 3))
    graph.operator("FULLY_CONNECTED", ["head", "d4"], "stored", "FullyConnected")
    return graph.write(path, {"input": "args_0"}, {"output": "stored"})


def write_convs(path: Path, layers: int = 2) -> Path:
    """input (batch, 8, 8, 3) → float 3×3 convolutions `layers.<i>.conv` of 3 channels with ReLU → output."""
    rng = np.random.default_rng(0)
    graph = Graph()
    value = graph.tensor("args_0", (None, 8, 8, 3))
    for i in range(layers):
        inputs = [value, graph.constant(f"w{i}", rng.normal(0, 0.3, size=(3, 3, 3, 3)).astype(np.float32))]
        inputs.append(graph.constant(f"b{i}", np.full(3, 0.1, np.float32)))
        value = graph.tensor(f"layers.{i}.conv", (None, 8, 8, 3))
        graph.operator(
            "CONV_2D",
            inputs,
            value,
            "Conv2D",
            strideH=1,
            strideW=1,
            fusedActivationFunction=schema.ActivationFunctionType.RELU,
        )
    return graph.write(path, {"input": "args_0"}, {"output": value})


def write_cut(path: Path) -> Path:
    """input (batch, 8, 8, 3) → abs → cumulative sum, which XNNPACK does not run → abs → output."""
    graph = Graph()
    value = graph.tensor("args_0", (None, 8, 8, 3))
    for i, kind in enumerate(("ABS", "CUMSUM", "ABS")):
        output = graph.tensor(f"y{i}", (None, 8, 8, 3))
        inputs = [value, graph.constant("axis", np.array(1, np.int32))] if kind == "CUMSUM" else [value]
        graph.operator(kind, inputs, output, "Cumsum" if kind == "CUMSUM" else "")
        value = output
    return graph.write(path, {"input": "args_0"}, {"output": value})

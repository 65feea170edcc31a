"""Small model files and inputs for tests, with their results in numpy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocompress.core.artifact import Artifact, TensorSpec, sha256_of

Array = NDArray[Any]


def artifact_of(
    path: Path, shape: Sequence[int | None] = (None, 4), outputs: Sequence[int | None] = (None, 3)
) -> Artifact:
    """The artifact value of a file with one float input and one float output."""
    return Artifact(
        path=str(path.absolute()),
        format="onnx",
        inputs=(TensorSpec(name="input", dtype="float32", shape=tuple(shape)),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=tuple(outputs)),),
        sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
    )


def write_inputs(folder: Path, **arrays: Array) -> Path:
    """One .npy file per input."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_fake(path: Path, **model: Any) -> Path:
    """A model file of tests.fakes."""
    path.write_text(json.dumps({"inputs": {"input": ["float32", [None, 4]]}, **model}), encoding="utf-8")
    return path


def write_linear(path: Path, weight: Array, bias: Array) -> Path:
    """ONNX: output = input @ weight + bias, one Gemm named `layers.0.fc`."""
    nodes = [helper.make_node("Gemm", ["input", "weight", "bias"], ["output"], name="layers.0.fc")]
    return _save(path, nodes, {"weight": weight, "bias": bias}, [None, weight.shape[0]], [None, weight.shape[1]])


def write_convs(path: Path, layers: int, channels: int = 16, size: int = 16, note: str = "", seed: int = 0) -> Path:
    """ONNX: a stack of equal 3×3 convolutions with Relu, named `layers.<i>.conv`."""
    rng = np.random.default_rng(seed)
    nodes, weights, value = [], {}, "input"
    for i in range(layers):
        shape = (channels, channels, 3, 3)
        weights[f"layers.{i}.conv.weight"] = rng.normal(0, (2 / (9 * channels)) ** 0.5, shape).astype(np.float32)
        out = "output" if i == layers - 1 else f"relu{i}"
        nodes.append(
            helper.make_node(
                "Conv", [value, f"layers.{i}.conv.weight"], [f"conv{i}"], name=f"layers.{i}.conv", pads=[1, 1, 1, 1]
            )
        )
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [out], name=f"layers.{i}.relu"))
        value = out
    shape_in = [None, channels, size, size]
    return _save(path, nodes, weights, shape_in, shape_in, note)


def write_mixed(path: Path) -> Path:
    """ONNX: input (batch, 3, 8, 8) → integer conv `layers.0.conv`, float conv `layers.1.conv`, `pool`, integer `fc`
    with a float bias added after it, float MatMul `head` with an addition.
    """
    rng = np.random.default_rng(0)
    graph = _Quantized()
    x = graph.activation("input", 0.05, 128)
    graph.node("Conv", [x, graph.weight("w0", rng.normal(size=(16, 3, 3, 3)))], "c0", "layers.0.conv", pads=[1] * 4)
    graph.node("Relu", ["c0"], "r0", "layers.0.relu")
    x = graph.activation("r0", 0.1, 0)
    graph.weights["w1"] = rng.normal(size=(16, 16, 3, 3)).astype(np.float32)
    graph.node("Conv", [x, "w1"], "c1", "layers.1.conv", pads=[1] * 4)
    graph.node("Relu", ["c1"], "r1", "layers.1.relu")
    graph.node("GlobalAveragePool", ["r1"], "p", "pool")
    graph.node("Flatten", ["p"], "f", "flatten")
    x = graph.activation("f", 0.1, 128)
    graph.node("MatMul", [x, graph.weight("w2", rng.normal(size=(16, 16)))], "m", "fc")
    x = graph.activation("m", 0.2, 128)
    graph.weights |= {"b2": np.ones(16, np.float32), "w3": rng.normal(size=(16, 3)).astype(np.float32)}
    graph.weights["b3"] = np.ones(3, np.float32)
    graph.node("Add", [x, "b2"], "a", "fc.bias")
    graph.node("MatMul", ["a", "w3"], "h", "head")
    graph.node("Add", ["h", "b3"], "output", "head.bias")
    return _save(path, graph.nodes, graph.weights, [None, 3, 8, 8], [None, 3])


MIXED_PRECISIONS = {"layers.0.conv": "int8", "layers.1.conv": "fp32", "fc": "int8", "head": "fp32"}


class _Quantized:
    """A graph under construction: uint8 activations, symmetric int8 weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}

    def node(self, operator: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))

    def activation(self, value: str, scale: float, zero: int) -> str:
        self.weights |= {f"{value}_scale": np.array(scale, np.float32), f"{value}_zero": np.array(zero, np.uint8)}
        both = [f"{value}_scale", f"{value}_zero"]
        self.node("QuantizeLinear", [value, *both], f"{value}_q", f"{value}_quantize")
        self.node("DequantizeLinear", [f"{value}_q", *both], f"{value}_dq", f"{value}_dequantize")
        return f"{value}_dq"

    def weight(self, name: str, value: Array) -> str:
        # 7 bits: on x86 without VNNI a pair of uint8 × int8 products overflows the 16 bits it is summed in.
        scale = np.float32(np.abs(value).max() / 64)
        self.weights |= {f"{name}_q": np.round(value / scale).astype(np.int8), f"{name}_scale": np.array(scale)}
        self.node("DequantizeLinear", [f"{name}_q", f"{name}_scale"], name, f"{name}_dequantize")
        return name


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    shape_in: Sequence[int | None],
    shape_out: Sequence[int | None],
    note: str = "",
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
        doc_string=note,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path

"""TensorRT."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import helper

from autocompress.compress.quantize import ActivationStats
from autocompress.core.candidate import parse_precision
from autocompress.device.tensorrt import TensorRt
from autocompress.export.graph import to_bytes
from autocompress.export.symmetric import lower_symmetric
from tests.contracts.cases import Case
from tests.contracts.onnx_files import onnx_case
from tests.export.graphs import graph_of, normal

EXECUTED = {"layers.0.conv": "int8", "layers.1.conv": "fp32", "fc": "int8", "head": "fp32"}


def case(folder: Path) -> Case:
    """On ONNX files; those of mixed precision in its own dialect."""
    return replace(onnx_case(TensorRt(), folder), mixed=write_symmetric(folder / "symmetric.onnx"), executed=EXECUTED)


def write_symmetric(path: Path) -> Path:
    """Integer convolution, float convolution, integer product, float product."""
    nodes = [
        helper.make_node("Conv", ["input", "w0"], ["c0"], name="layers.0.conv", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], name="layers.0.relu"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="layers.1.conv", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c1"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "w2"], ["m"], name="fc"),
        helper.make_node("MatMul", ["m", "w3"], ["output"], name="head"),
    ]
    weights = {"w0": normal(32, 3, 3, 3), "w1": normal(32, 32, 3, 3), "w2": normal(32, 32), "w3": normal(32, 4)}
    stats = {name: ActivationStats(low=-4.0, high=4.0, sample=np.zeros(1, np.float32)) for name in ("input", "f")}
    layers = dict.fromkeys(("layers.0.conv", "fc"), parse_precision("w8a8"))
    graph = graph_of(nodes, weights, [None, 3, 8, 8], rank=2)
    path.write_bytes(to_bytes(lower_symmetric(graph, layers, stats, "minmax", dialect="int8")))
    return path

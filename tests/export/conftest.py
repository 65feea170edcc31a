"""Networks exported once, for all tests here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.layers import describe
from autocompress.compress.quantize import ActivationStats
from autocompress.compress.recover import outputs_of
from autocompress.compress.width import ChannelGroup
from autocompress.core.candidate import LayerChoice, parse_precision
from autocompress.export.calibrate import collect_stats
from autocompress.export.graph import to_bytes
from autocompress.export.parity import run_onnx
from autocompress.export.qdq import lower
from autocompress.export.template import Template, export_template
from tests import nets

Arrays = list[np.ndarray]
CASES = [name for name in nets.CASES if name != "perceptron"]  # all its kinds of node are in the others
OUTPUTS = {"encoder": ("logits", "pooled")}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A network, its template, and what calibration on 256 items saw."""

    net: nn.Module
    inputs: Callable[..., dict[str, Tensor]]
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any]
    groups: tuple[ChannelGroup, ...]
    template: Template
    outputs: tuple[str, ...]
    stats: dict[str, ActivationStats] = field(default_factory=dict)

    def feeds(self, batch: int = 64, seed: int = 99) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.inputs(batch, seed=seed).items()}

    def torch(self, net: nn.Module, batch: int = 64, seed: int = 99) -> Arrays:
        with torch.no_grad():
            return [tensor.numpy() for tensor in outputs_of(self.call(net, self.inputs(batch, seed=seed)))]

    def filled(self, net: nn.Module | None = None) -> ir.Model:
        return self.template.fill(self.net if net is None else net)

    def lowered(self, layers: Mapping[str, LayerChoice], stats: Mapping[str, ActivationStats] | None = None) -> bytes:
        return to_bytes(lower(self.filled(), layers, self.stats if stats is None else stats, "minmax"))

    def uniform(self, precision: str, names: Sequence[str] | None = None) -> dict[str, LayerChoice]:
        """One precision for these layers, all by default."""
        return {name: parse_precision(precision) for name in (self.template.nodes if names is None else names)}


def export(name: str) -> Exported:
    build, inputs, call = nets.CASES[name]
    net = nets.seeded(build)
    structure, anatomy = describe(net, lambda model: call(model, inputs()))
    outputs = OUTPUTS.get(name, ("output",))
    layers = [layer.name for layer in structure.layers]
    template = export_template(net, inputs(2), layers, outputs, by_keyword=call is nets.by_name)
    made = Exported(net=net, inputs=inputs, call=call, groups=anatomy.groups, template=template, outputs=outputs)
    made.stats.update(collect_stats(made.filled(), template.nodes, [made.feeds(64, seed) for seed in range(4)]))
    return made


@pytest.fixture(scope="session")
def exported() -> Callable[[str], Exported]:
    """A case of tests.nets by name, exported on first use."""
    found: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in found:
            found[name] = export(name)
        return found[name]

    return get


def executed(data: bytes, folder: Path) -> dict[str, str]:
    """Kinds of nodes by name in the graph that ONNX Runtime makes of a file and runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return {node.name: node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}


def kinds(data: bytes) -> list[str]:
    """Kinds of nodes in a file."""
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def run(data: bytes, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Outputs of a file, which is checked first."""
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return run_onnx(data, feeds)

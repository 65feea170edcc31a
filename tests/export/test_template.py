import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from autocompress.compress.width import cut_widths
from autocompress.core.errors import StageError, TaskError
from autocompress.export.graph import specs, to_bytes
from autocompress.export.parity import FLOAT_TOLERANCE, float_difference, run_onnx
from autocompress.export.template import export_template
from tests import nets
from tests.export.conftest import CASES, Exported, kinds, run

Get = Callable[[str], Exported]
EXACT = 1e-5


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_one_node_of_its_name(exported: Get, name: str) -> None:
    case = exported(name)
    nodes = {node.name: node.op_type for node in case.filled().graph}
    assert case.template.unmapped == {}
    wanted = {"Conv1d": {"Conv"}, "Conv2d": {"Conv"}, "Linear": {"Gemm", "MatMul"}, "Embedding": {"Gather"}}
    for layer in case.template.nodes:
        assert nodes[layer] in wanted[type(case.net.get_submodule(layer)).__name__]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_filled_template_computes_what_torch_does_for_any_batch(exported: Get, name: str, batch: int) -> None:
    case = exported(name)
    assert case.template.dynamic_batch
    got = run(to_bytes(case.filled()), case.feeds(batch))
    assert float_difference(got, case.torch(case.net, batch)) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_it_takes_any_cut_of_any_weights(exported: Get, name: str) -> None:
    case = exported(name)
    build, _, _ = nets.CASES[name]
    other = nets.seeded(build, seed=1)
    widths = {g.name: g.partitions * max(1, g.width // g.partitions // 2) for g in case.groups}
    for chosen in ({}, *({group: width} for group, width in widths.items()), widths):
        cut = cut_widths(other, case.groups, chosen).requires_grad_(False)
        got = run_onnx(to_bytes(case.filled(cut)), case.feeds(3))
        assert float_difference(got, case.torch(cut, 3)) < EXACT


def test_filling_leaves_the_template_and_the_model_as_they_were(exported: Get) -> None:
    case = exported("residual")
    before = copy.deepcopy(case.net.state_dict())
    first = to_bytes(case.filled())
    case.filled(cut_widths(case.net, case.groups, {"conv1": 8}))
    assert to_bytes(case.filled()) == first
    assert all(torch.equal(value, before[key]) for key, value in case.net.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "separable", "branches", "flat"])
def test_batchnorm_is_part_of_the_layer_before_it(exported: Get, name: str) -> None:
    case = exported(name)
    assert any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in case.net.modules())
    assert "BatchNormalization" not in kinds(to_bytes(case.filled()))


class Padded(torch.nn.Module):
    """Zeros on two sides, as TensorFlow pads; ones; and a reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros, self.ones, self.mirror = (torch.nn.Conv2d(c, 4, 3, 2, p) for c, p in ((3, 1), (4, 0), (4, 0)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = functional.pad(self.zeros(functional.pad(input, (0, 1, 0, 1))), (1, 1, 1, 1), value=1.0)
        return self.mirror(functional.pad(self.ones(x), (1, 1, 1, 1), mode="reflect"))


def test_zeros_around_an_image_are_padding_of_the_convolution() -> None:
    torch.manual_seed(0)
    net, x = Padded().eval(), torch.randn(2, 3, 15, 15)
    template = export_template(net, {"input": x}, ["zeros", "ones", "mirror"], ["output"], by_keyword=False)
    graph = template.fill(net)
    pads = {n.name: list(n.attributes["pads"].as_ints()) for n in graph.graph if n.op_type == "Conv"}
    assert pads == {"zeros": [1, 1, 2, 2], "ones": [0] * 4, "mirror": [0] * 4}
    assert kinds(to_bytes(graph)).count("Pad") == 2
    with torch.no_grad():
        wanted = net(x).numpy()
    assert float_difference(run(to_bytes(graph), {"input": x.numpy()}), [wanted]) < EXACT


class Loose(torch.nn.Module):
    """BatchNorm that follows no layer, and a weight that two nodes read."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(12)
        self.a, self.b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.bn(input)
        return self.b(self.a(x) + torch.nn.functional.linear(x, self.a.weight))


def test_what_cannot_be_folded_or_mapped_stays_and_is_still_exact() -> None:
    net = nets.seeded(Loose)
    made = export_template(net, nets.rows(), ["a", "b"], ["output"], by_keyword=False)
    assert list(made.nodes) == ["b"]
    assert made.unmapped == {
        "a": "its weight is not read by exactly one Conv, Gemm, MatMul or Gather of the exported graph"
    }
    data = to_bytes(made.fill(net))
    assert kinds(data).count("BatchNormalization") == 1
    x = nets.rows(7)["input"]
    assert float_difference(run(data, {"input": x.numpy()}), [net(x).numpy()]) < EXACT


def test_inputs_and_outputs_keep_names_order_and_types(exported: Get) -> None:
    graph = exported("encoder").filled().graph
    inputs, outputs = specs(list(graph.inputs)), specs(list(graph.outputs))
    assert [(s.name, s.dtype, s.shape) for s in inputs] == [
        ("tokens", "int64", (None, 10)),
        ("mask", "int64", (None, 10)),
    ]
    assert [(s.name, s.dtype, s.shape) for s in outputs] == [
        ("logits", "float32", (None, 3)),
        ("pooled", "float32", (None, 16)),
    ]
    assert [s.name for s in specs(list(exported("branches").filled().graph.inputs))] == ["signal", "features"]


def test_nothing_of_the_tracing_is_left_in_the_file(exported: Get) -> None:
    assert b"site-packages" not in to_bytes(exported("residual").filled())
    assert b"nets.py" not in to_bytes(exported("residual").filled())


def test_a_model_torch_cannot_export_is_a_fault_of_the_task_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError) as caught:
        export_template(nets.seeded(nets.Undecided), nets.rows(), ["fc"], ["output"], by_keyword=False)
    assert str(caught.value).startswith("torch cannot export the model to ONNX: ")
    assert "data-dependent" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_tampered_weight_is_seen(exported: Get) -> None:
    case = exported("flat")
    spoilt = copy.deepcopy(case.net)
    spoilt.up.weight[3, 5] += 1.0
    got = run_onnx(to_bytes(case.filled(spoilt)), case.feeds(8))
    assert float_difference(got, case.torch(case.net, 8)) > FLOAT_TOLERANCE


def test_widths_that_do_not_fit_together_do_not_run(exported: Get) -> None:
    case = exported("flat")
    broken = copy.deepcopy(case.net)
    broken.up = torch.nn.Linear(99, 24)
    with pytest.raises(StageError, match="ONNX Runtime fails on the exported graph") as caught:
        run_onnx(to_bytes(case.filled(broken)), case.feeds(1))
    assert caught.value.stage == "export"


def test_weights_are_float32_however_the_model_keeps_them(exported: Get) -> None:
    case = exported("flat")
    arrays = [v.const_value.numpy() for v in case.filled().graph.initializers.values() if v.const_value is not None]
    assert {a.dtype for a in arrays if np.issubdtype(a.dtype, np.floating)} == {np.dtype(np.float32)}

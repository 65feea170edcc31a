import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from autocompress.compress.layers import describe
from autocompress.core.space import Structure
from tests import nets
from tests.compress.conftest import Described, same, state_of

Get = Callable[[str], Described]


def structure_of(net: nn.Module, inputs: dict[str, Tensor]) -> Structure:
    before = state_of(net)
    structure, _ = describe(net, lambda model: model(**inputs))
    assert same(net.state_dict(), before)
    return structure


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("residual", {"conv2d": 5, "linear": 1}),
        ("separable", {"conv2d": 4, "linear": 1}),
        ("branches", {"conv1d": 4, "linear": 2}),
        ("perceptron", {"linear": 3}),
        ("encoder", {"embedding": 1, "linear": 7}),
    ],
)
def test_layers_are_found_by_kind_with_their_shapes(described: Get, name: str, kinds: dict[str, int]) -> None:
    case = described(name)
    found = [layer.kind for layer in case.structure.layers]
    assert {kind: found.count(kind) for kind in set(found)} == kinds
    for layer in case.structure.layers:
        assert layer.shape == tuple(case.net.get_submodule(layer.name).get_parameter("weight").shape)


def test_layers_that_must_not_change_are_left_alone_by_name_and_reason() -> None:
    structure = structure_of(nets.seeded(nets.Odd), {"tokens": nets.sentences()["tokens"]})
    assert [layer.name for layer in structure.layers] == ["first", "up", "down"]
    assert [group.name for group in structure.groups] == ["up"]
    reasons = {
        "tokens": "its weight is tied to decoder.weight",
        "decoder": "its weight is tied to tokens.weight",
        "twice": "it runs 2 times in one forward",
        "lstm": "LSTM is not a layer that can be compressed here",
        "normed": "its weight is re-parametrised",
        "unused": "its forward did not run on the sample",
        "(the model itself)": "Odd is not a layer that can be compressed here",
        "down": "width kept: coupled with decoder, which is left alone",
    }
    assert reasons.items() <= structure.left_alone.items()


def _masked() -> nn.Module:
    layer = nn.Linear(12, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize(
    "make", [lambda: nn.utils.weight_norm(nn.Linear(12, 8)), lambda: nn.utils.spectral_norm(nn.Linear(12, 8)), _masked]
)
def test_a_weight_that_hooks_compute_is_left_alone(make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old forms are what is tested
        net = nn.Sequential(make(), nn.ReLU(), nn.Linear(8, 4)).eval()
    structure = structure_of(net, nets.rows())
    assert [layer.name for layer in structure.layers] == ["2"]
    assert structure.groups == ()
    assert structure.left_alone["0"] == "its weight is computed from other parameters"


def test_attention_heads_are_left_alone_and_the_feed_forward_is_not(described: Get) -> None:
    structure = described("encoder").structure
    (reason,) = {structure.left_alone[name] for name in ("q", "k", "v") if name in structure.left_alone}
    assert "cutting channels is not the same as silencing them" in reason
    (group,) = structure.groups
    assert (group.name, group.layers) == ("up", ("up", "down"))


def test_the_models_output_is_never_cut(described: Get) -> None:
    for name, layer in (("residual", "fc"), ("encoder", "head"), ("perceptron", "6")):
        assert described(name).structure.left_alone[layer] == "width kept: these channels are the model's output"


def test_a_layer_in_another_type_is_left_alone() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8).bfloat16(), nn.Linear(8, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.b(self.a(input.bfloat16()).float())

    structure = structure_of(nets.seeded(Half), nets.rows())
    assert structure.left_alone["a"] == "its weight is torch.bfloat16, not float32"
    assert [layer.name for layer in structure.layers] == ["b"]


def test_a_model_without_a_dependency_graph_keeps_its_widths_and_says_why() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.b(torch.from_numpy(np.tanh(self.a(input).numpy())))

    structure = structure_of(nets.seeded(Detour), nets.rows())
    assert [layer.name for layer in structure.layers] == ["a", "b"]
    assert structure.groups == ()
    assert structure.left_alone["(all widths)"].startswith("the dependency graph could not be built: RuntimeError: ")


def test_a_block_is_the_smallest_module_around_at_least_two_layers() -> None:
    def net() -> nn.Module:
        def pair() -> nn.Module:
            return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))

        return nn.Sequential(nn.Linear(12, 12), nn.Sequential(pair(), pair()), pair())

    blocks = {layer.name: layer.block for layer in structure_of(nets.seeded(net), nets.rows()).layers}
    assert blocks == {
        "0": "0", "1.0.0": "1.0", "1.0.2": "1.0", "1.1.0": "1.1", "1.1.2": "1.1", "2.0": "2", "2.2": "2",
    }  # fmt: skip


def test_describing_leaves_no_hook_and_no_gradient() -> None:
    net = nets.seeded(nets.Residual).requires_grad_(False)
    structure_of(net, nets.image())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert torch.is_grad_enabled()

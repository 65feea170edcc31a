import copy
import math
from collections.abc import Callable, Collection

import pytest
import torch
from torch import nn

from autocompress.compress.recover import outputs_of
from autocompress.compress.width import ChannelGroup, channel_groups, cut_widths
from autocompress.core.errors import StageError
from tests.compress.conftest import Described, same, state_of
from tests.nets import CASES

Get = Callable[[str], Described]
NORMS = nn.modules.batchnorm._BatchNorm | nn.LayerNorm

GROUPS = {
    "residual": {"short": 32, "conv2": 16, "conv1": 24},
    "separable": {"grouped.0": 32, "pointwise.0": 32, "depthwise.0": 16},
    "flat": {"up": 24, "conv": 8},
    "branches": {"side": 8, "merge.0": 16, "wide.0": 8, "stem.0": 16, "narrow.0": 16},
    "perceptron": {"3": 16, "0": 32},
    "encoder": {"up": 32},
}


def silence(case: Described, group: ChannelGroup, gone: Collection[int]) -> nn.Module:
    """The original with the group's channels silent where they are made: weight, bias and normalisation zero."""
    net = copy.deepcopy(case.net)
    with torch.no_grad():
        for cut in group.cuts:
            module = net.get_submodule(cut.module)
            places = [i for r, i in zip(cut.root, cut.index, strict=True) if r in gone]
            if cut.is_input or not hasattr(module, "weight"):
                continue
            module.weight[places] = 0
            if module.bias is not None:
                module.bias[places] = 0
    return net


@pytest.mark.parametrize("name", CASES)
def test_groups_are_the_channels_that_must_go_together(described: Get, name: str) -> None:
    assert {group.name: group.width for group in described(name).groups} == GROUPS[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_every_layer_of_a_cut_model_has_the_width_that_was_asked_for(described: Get, name: str, share: float) -> None:
    case = described(name)
    widths = {g.name: g.partitions * max(1, int(share * g.width / g.partitions)) for g in case.groups}
    before = state_of(case.net)
    cut = cut_widths(case.net, case.groups, widths)
    for group in case.groups:
        module = cut.get_submodule(group.name)
        assert len(module.get_parameter("weight")) == widths[group.name]
    for module in cut.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    outputs = outputs_of(case.call(cut, case.inputs(5)))
    assert [o.shape for o in outputs] == [o.shape for o in outputs_of(case.call(case.net, case.inputs(5)))]
    assert same(case.net.state_dict(), before)


@pytest.mark.parametrize("name", CASES)
def test_cutting_channels_gives_what_silencing_them_gives(described: Get, name: str) -> None:
    case = described(name)
    for group in case.groups:
        width = group.partitions * max(1, group.width // group.partitions // 2)
        cut = cut_widths(case.net, case.groups, {group.name: width})
        silent = silence(case, group, group.removed(width))
        for got, wanted in zip(
            outputs_of(case.call(cut, case.inputs(5))), outputs_of(case.call(silent, case.inputs(5))), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_original_widths_give_the_original(described: Get, name: str) -> None:
    case = described(name)
    whole = cut_widths(case.net, case.groups, {group.name: group.width for group in case.groups})
    assert same(whole.state_dict(), case.net.state_dict())


def test_channels_of_least_norm_go_first(described: Get) -> None:
    case = described("flat")
    net = copy.deepcopy(case.net)
    from autocompress.compress.layers import describe

    small = [1, 4, 6]
    with torch.no_grad():
        net.conv.weight[small] *= 1e-3
        net.up.weight.view(24, 8, 16)[:, small] *= 1e-3
    groups = describe(net, lambda model: model(**case.inputs()))[1].groups
    group = next(g for g in groups if g.name == "conv")
    assert group.removed(5) == set(small)
    kept = [i for i in range(8) if i not in small]
    cut = cut_widths(net, groups, {"conv": 5})
    assert torch.equal(cut.conv.weight, net.conv.weight[kept])
    assert torch.equal(cut.up.weight, net.up.weight.view(24, 8, 16)[:, kept].reshape(24, 80))


def test_groups_of_a_grouped_convolution_keep_the_same_channels_each(described: Get) -> None:
    group = next(g for g in described("separable").groups if g.name == "pointwise.0")
    kept = sorted(set(range(32)) - group.removed(16))
    assert group.partitions == 4
    assert [c % 8 for c in kept] == [c % 8 for c in kept[:4]] * 4
    assert [c // 8 for c in kept] == [p for p in range(4) for _ in range(4)]


@pytest.mark.parametrize("width", [0, 33, 18, -4])
def test_a_width_that_cannot_be_is_refused(described: Get, width: int) -> None:
    case = described("separable")
    with pytest.raises(
        StageError, match=rf"'pointwise.0' has 32 channels in 4 parts: it cannot keep {width}"
    ) as caught:
        cut_widths(case.net, case.groups, {"pointwise.0": width})
    assert caught.value.stage == "compress"


def test_a_group_that_is_not_there_is_refused(described: Get) -> None:
    case = described("flat")
    with pytest.raises(StageError, match="there is no channel group 'convs' in the model"):
        cut_widths(case.net, case.groups, {"convs": 4})


@pytest.mark.parametrize("name", CASES)
def test_structure_lists_groups_with_the_step_their_widths_must_have(described: Get, name: str) -> None:
    case = described(name)
    for value, group in zip(case.structure.groups, case.groups, strict=True):
        assert (value.name, value.width, value.step) == (group.name, group.width, group.partitions)
        assert len(group.order) == group.width // group.partitions
        assert value.name in value.layers
        assert math.gcd(value.width, value.step) == value.step


class Recurrent(nn.Module):
    """Convolutions before a GRU, layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 12, 3, padding=1)
        self.gru = nn.GRU(12, 20, batch_first=True)
        self.third, self.last = nn.Linear(20, 24), nn.Linear(24, 2)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.second(self.first(waves).relu()).relu().transpose(1, 2))
        out: torch.Tensor = self.last(self.third(states[:, -1]).relu())
        return out


def test_a_group_that_cannot_be_followed_keeps_its_width_and_no_other_does() -> None:
    torch.manual_seed(0)
    net, waves = Recurrent().eval(), torch.randn(2, 3, 10)
    layers = ("first", "second", "third", "last")
    groups, refused = channel_groups(net, lambda model: model(waves), layers)
    assert {group.name for group in groups} == {"first", "third"}
    assert refused["second"].startswith("width kept: ")
    assert "(all widths)" not in refused
    widths = {"first": 8, "third": 12}
    cut = cut_widths(net, groups, widths)
    assert (cut.second.in_channels, cut.last.in_features) == (8, 12)
    assert cut(waves).shape == (2, 2)

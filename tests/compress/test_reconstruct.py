import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.reconstruct import reconstruct
from autocompress.compress.rows import _patches, _places, _planes
from autocompress.compress.width import ChannelGroup, channel_groups, cut_widths
from autocompress.tasks import digits
from tests import nets
from tests.compress.conftest import Described, same, state_of
from tests.compress.materials import of_case, of_tensors
from tests.nets import CASES

Get = Callable[[str], Described]


def halves(groups: tuple[ChannelGroup, ...]) -> dict[str, int]:
    return {g.name: g.partitions * (g.width // g.partitions // 2) for g in groups}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, 1, 1), (4, 8, 9, 7)),
    "strides": (lambda: nn.Conv2d(8, 6, (3, 2), (2, 3), (1, 0), dilation=(2, 1), bias=False), (4, 8, 9, 7)),
    "same": (lambda: nn.Conv2d(8, 6, (5, 3), padding="same"), (4, 8, 9, 7)),
    "circular": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), (4, 8, 9, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, 1, 1, groups=4), (4, 8, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, 2, 1, groups=8), (4, 8, 9, 7)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 5, 2, 2), (4, 8, 33)),
    "linear": (lambda: nn.Linear(8, 6), (4, 8)),
    "tokens": (lambda: nn.Linear(8, 6), (4, 5, 8)),
    "windows": (lambda: nn.Linear(8, 6), (4, 3, 5, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_weights_times_what_it_reads_is_what_it_gives(name: str) -> None:
    build, shape = LAYERS[name]
    layer: Any = nets.seeded(build)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = _planes(layer, layer(x))
    i, j = _places(3, *y.shape[2:])
    rows = _patches(layer, x, 3)
    got = torch.einsum("ngi,goi->ngo", rows, layer.weight.reshape(rows.shape[1], -1, rows.shape[2])).flatten(1)
    got = got if layer.bias is None else got + layer.bias
    torch.testing.assert_close(got, y[:, :, i, j].movedim(1, -1).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_layer_of_a_cut_model_gets_worse_and_its_shapes_stay(described: Get, name: str) -> None:
    case = described(name)
    widths = halves(case.groups)
    cut = cut_widths(case.net, case.groups, widths)
    before, shapes = state_of(cut), [p.shape for p in cut.parameters()]
    errors = reconstruct(cut, case.net, case.groups, widths, of_case(case))
    assert [p.shape for p in cut.parameters()] == shapes
    assert errors
    assert all(after <= first for first, after in errors.values())
    better = {name for name, (first, after) in errors.items() if after < first}
    changed = {n.rpartition(".")[0] for n, value in cut.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == better


def test_what_a_layer_loses_with_channels_that_say_the_same_comes_back(described: Get) -> None:
    net = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)))
    net[0].weight[1::2] = 0.5 * net[0].weight[::2]
    net[0].bias[1::2] = 0.5 * net[0].bias[::2]
    x = nets.image(96)["x"]
    groups = tuple(channel_groups(net, lambda model: model(x[:2]), {"0", "2"})[0])
    cut = cut_widths(net, groups, {"0": 8})
    assert {int(i) % 2 for i in groups[0].order[:8]} == {0}
    assert (cut(x) - net(x)).abs().max() > 0.2
    errors = reconstruct(cut, net, groups, {"0": 8}, of_tensors(x, x))
    assert list(errors) == ["2"]
    assert errors["2"][0] > 0.05 > 0.001 > errors["2"][1]
    assert (cut(x) - net(x)).abs().max() < 0.02


def test_a_layer_makes_up_for_the_one_before_it_and_odd_ones_are_left_alone() -> None:
    net = nets.seeded(nets.Odd)
    other = copy.deepcopy(net)
    other.first.weight += 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    before = state_of(other)
    tokens = torch.randint(0, 24, (96, 5), generator=torch.Generator().manual_seed(0))
    errors = reconstruct(other, net, (), {}, of_tensors(tokens, tokens))
    assert list(errors) == ["first"]
    assert errors["first"][1] < 1e-4
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"first.weight", "first.bias"}


def test_a_fit_that_is_no_good_on_other_items_is_not_kept() -> None:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.cat([torch.full((32, 8), 5.0), nets.rows(32, 8)["input"]])  # it is fitted to the first batch
    groups = tuple(channel_groups(net, lambda model: model(x[:2]), {"0", "2"})[0])
    cut = cut_widths(net, groups, {"0": 4})
    before = state_of(cut)
    errors = reconstruct(cut, net, groups, {"0": 4}, of_tensors(x, x))
    assert errors["2"][0] == errors["2"][1] > 0.01
    assert same(cut.state_dict(), before)


def test_one_batch_cannot_be_fitted_to_and_held_out() -> None:
    net = nets.seeded(nets.perceptron)
    x = nets.rows(20)["input"]
    groups = tuple(channel_groups(net, lambda model: model(x[:2]), {"0", "3", "6"})[0])
    cut = cut_widths(net, groups, {"0": 16})
    assert reconstruct(cut, net, groups, {"0": 16}, of_tensors(x, x)) == {}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[ChannelGroup, ...], Tensor, Tensor]:
    net = digits.model().requires_grad_(False)
    layers = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    parts = digits.split()
    groups, _ = channel_groups(net, lambda model: model(parts["train"].tensors[0][:2]), layers)
    return net, tuple(groups), parts["train"].tensors[0], parts["validation"].tensors[0]


def test_a_real_model_cut_to_half_answers_as_before_more_often(
    trained: tuple[nn.Module, tuple[ChannelGroup, ...], Tensor, Tensor],
) -> None:
    net, groups, train, validation = trained
    widths = halves(groups)
    cut = cut_widths(net, groups, widths)
    wanted = net(validation).argmax(1)
    plain = float((cut(validation).argmax(1) == wanted).float().mean())
    errors = reconstruct(cut, net, groups, widths, of_tensors(train, train))
    fitted = float((cut(validation).argmax(1) == wanted).float().mean())
    assert sum(after < 0.5 * before for before, after in errors.values()) > 0.7 * len(errors)
    assert fitted > plain + 0.1
    assert fitted > 0.9


def test_fitting_does_not_change_the_original(
    trained: tuple[nn.Module, tuple[ChannelGroup, ...], Tensor, Tensor],
) -> None:
    net, groups, train, _ = trained
    before = state_of(net)
    widths = {groups[0].name: groups[0].partitions}
    reconstruct(cut_widths(net, groups, widths), net, groups, widths, of_tensors(train[:64], train[:64], F.mse_loss))
    assert same(net.state_dict(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.importance import ranked, taylor
from autocompress.compress.width import ChannelGroup, channel_groups, cut_widths
from autocompress.core.recipe import Importance
from autocompress.tasks import digits
from tests import nets
from tests.compress.conftest import Described, same, state_of
from tests.compress.materials import of_case, of_tensors
from tests.nets import CASES

Get = Callable[[str], Described]
OTHERS: tuple[Importance, ...] = ("batchnorm", "taylor", "activation")


def named(groups: tuple[ChannelGroup, ...], name: str) -> ChannelGroup:
    return next(group for group in groups if group.name == name)


def order(net: nn.Module, case: Described, name: str, importance: Importance) -> list[int]:
    return list(named(ranked(net, case.groups, importance, of_case(case)), name).order)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("importance", OTHERS)
def test_the_same_channels_in_another_order_and_the_model_as_it_was(
    described: Get, name: str, importance: Importance
) -> None:
    case = described(name)
    before = state_of(case.net)
    found = ranked(case.net, case.groups, importance, of_case(case))
    assert same(case.net.state_dict(), before)
    assert [g.name for g in found] == [g.name for g in case.groups]
    for old, new in zip(case.groups, found, strict=True):
        assert sorted(new.order) == sorted(old.order)
        assert (new.width, new.partitions, new.cuts) == (old.width, old.partitions, old.cuts)


def test_by_magnitude_groups_stay_as_they_are(described: Get) -> None:
    case = described("residual")
    assert ranked(case.net, case.groups, "magnitude", of_case(case)) == tuple(case.groups)


def test_by_batchnorm_the_largest_scales_come_first_whatever_their_sign(described: Get) -> None:
    case = described("perceptron")
    net = copy.deepcopy(case.net)
    net[1].weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    wanted = net[1].weight.abs().argsort(descending=True)
    assert order(net, case, "0", "batchnorm") == wanted.tolist()


def test_scales_of_batchnorms_that_are_added_count_together(described: Get) -> None:
    case = described("residual")
    net = copy.deepcopy(case.net)
    wanted = (net.bn.weight.abs() + net.bn2.weight.abs()).argsort(descending=True)
    assert order(net, case, "conv2", "batchnorm") == wanted.tolist()


def test_a_group_without_batchnorm_keeps_its_order(described: Get) -> None:
    case = described("flat")
    assert tuple(order(case.net, case, "conv", "batchnorm")) == named(case.groups, "conv").order


def test_a_channel_that_nothing_listens_to_is_the_first_by_magnitude_and_the_last_by_taylor(described: Get) -> None:
    case = described("perceptron")
    net = copy.deepcopy(case.net)
    net[0].weight[5] *= 100
    net[3].weight[:, 5] = 0
    groups, _ = channel_groups(net, lambda model: case.call(model, case.inputs()), {"0", "3", "6"})
    assert named(tuple(groups), "0").order[0] == 5
    assert order(net, case, "0", "taylor")[-1] == 5


def test_taylor_is_the_weight_times_the_gradient_of_the_tasks_loss() -> None:
    net = nn.Linear(4, 3).requires_grad_(False)
    x, y = nets.rows(16, 4)["input"], torch.arange(16) % 3
    found = taylor(net, of_tensors(x, y, F.cross_entropy))
    slope = (net(x).softmax(1) - F.one_hot(y, 3)) / 16
    torch.testing.assert_close(found["weight"], (net.weight * (slope.T @ x)).abs())
    torch.testing.assert_close(found["bias"], (net.bias * slope.sum(0)).abs())


def test_without_targets_taylor_asks_for_the_outputs_squared_norm() -> None:
    net = nn.Linear(4, 3, bias=False).requires_grad_(False)
    x = nets.rows(16, 4)["input"]
    found = taylor(net, of_tensors(x, torch.zeros(16)))
    torch.testing.assert_close(found["weight"], (net.weight * (2 * net(x).T @ x / 16)).abs())


def test_taylor_does_not_let_the_gradients_of_batches_cancel() -> None:
    net = nn.Linear(1, 1, bias=False).requires_grad_(False)
    x, y = torch.ones(32, 1), torch.tensor([1.0] * 16 + [-1.0] * 16)
    found = taylor(net, of_tensors(x, y, lambda output, target: (output[:, 0] * target).mean()))
    assert float(found["weight"]) == pytest.approx(abs(float(net.weight)) * 2**0.5)


def test_a_weight_that_is_not_used_is_not_felt() -> None:
    net = nets.seeded(nets.Odd)
    x = torch.randint(0, 24, (16, 5), generator=torch.Generator().manual_seed(0))
    found = taylor(net, of_tensors(x, torch.zeros(16)))
    assert not found["unused.weight"].any()
    assert found["first.weight"].any()


def test_by_activation_what_a_relu_silences_comes_last(described: Get) -> None:
    case = described("perceptron")
    net = copy.deepcopy(case.net)
    net[1].weight[7], net[1].bias[7] = 50, -1e4
    assert order(net, case, "0", "batchnorm")[0] == 7
    assert order(net, case, "0", "activation")[-1] == 7


def test_by_activation_what_the_next_layer_gives_without_a_channel_but_for_its_mean(described: Get) -> None:
    case = described("branches")
    net, merge = case.net, case.net.merge[0]
    x = torch.cat([case.inputs(16, seed=7 + start)["signal"] for start in range(0, 256, 16)])
    heard: Tensor = net.narrow(net.stem(x))
    lost = (heard - heard.mean((0, 2), keepdim=True)).square().mean((0, 2)) * merge.weight[:, :16].square().sum((0, 2))
    assert order(net, case, "narrow.0", "activation") == lost.argsort(descending=True).tolist()


def test_by_taylor_what_the_outputs_lose_first_without_a_channel_item_by_item() -> None:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = nets.rows(64, 4)["input"]
    groups = tuple(channel_groups(net, lambda model: model(x[:2]), {"0", "2"})[0])
    felt = (2 * net(x) @ net[2].weight * net[:2](x)).square().sum(0)
    assert ranked(net, groups, "taylor", of_tensors(x, x))[0].order == tuple(felt.argsort(descending=True).tolist())


def test_what_a_channel_does_to_two_readers_counts_together(described: Get) -> None:
    case = described("residual")
    net = copy.deepcopy(case.net)
    net.conv1.weight[:, 3] = net.conv3.weight[:, 3] = net.short.weight[:, 3] = 0
    net.bn.weight[3] = net.bn2.weight[3] = 100
    for importance in ("taylor", "activation"):
        assert order(net, case, "conv2", importance)[-1] == 3
    net.short.weight[:, 3] = 10
    for importance in ("taylor", "activation"):
        assert order(net, case, "conv2", importance)[0] == 3


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    net = digits.model().requires_grad_(False)
    layers = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    groups, _ = channel_groups(net, lambda model: model(digits.split()["train"].tensors[0][:2]), layers)
    return net, tuple(groups)


@pytest.mark.parametrize("importance", OTHERS)
def test_what_is_important_is_worth_more_than_what_is_not(
    trained: tuple[nn.Module, tuple[ChannelGroup, ...]], importance: Importance
) -> None:
    net, groups = trained
    x, y = (tensor[:128] for tensor in digits.split()["train"].tensors)

    def loss(group: ChannelGroup) -> float:
        part = group.width // group.partitions
        cut = cut_widths(net, [group], {group.name: group.partitions * (3 * part // 4)})
        with torch.no_grad():
            return float(F.cross_entropy(cut(x), y))

    found = ranked(net, groups, importance, of_tensors(x, y, F.cross_entropy))
    backwards = [replace(group, order=tuple(reversed(group.order))) for group in found]
    assert sum(map(loss, found)) < 0.8 * sum(map(loss, backwards))

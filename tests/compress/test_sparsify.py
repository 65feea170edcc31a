import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.sparsify import Gradual, cubic, hold, masks, rewound
from autocompress.core.candidate import BLOCK, PATTERNS, LayerChoice, parse_sparsity
from autocompress.core.errors import StageError
from tests import nets
from tests.compress.conftest import Described, same, state_of
from tests.compress.materials import of_case, of_tensors

Get = Callable[[str], Described]


def zeros(name: float | str, *layers: str) -> dict[str, LayerChoice]:
    return {layer: LayerChoice(sparsity=parse_sparsity(name)) for layer in layers}


def nothing() -> Any:
    return of_tensors(torch.zeros(1, 1), torch.zeros(1))


def chosen(net: nn.Module, layers: dict[str, LayerChoice], part: float = 1.0, **more: Any) -> dict[str, Tensor]:
    return masks(net, layers, part=part, **{"saliency": "magnitude", "material": nothing(), **more})


def weight_of(net: nn.Module, name: str) -> Tensor:
    return net.get_submodule(name).get_parameter("weight").detach()


def linear(*rows: list[float]) -> nn.Module:
    net = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False)).requires_grad_(False)
    net[0].weight.copy_(torch.tensor(rows))
    return net


def many(outputs: int = 32, inputs: int = 32) -> nn.Module:
    return nets.seeded(lambda: nn.Sequential(nn.Linear(inputs, outputs, bias=False)))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_exactly_the_share_of_smallest_weights_goes(described: Get, ratio: float) -> None:
    case = described("separable")
    names = [layer.name for layer in case.structure.layers]
    before = state_of(case.net)
    found = chosen(case.net, zeros(ratio, *names))
    assert same(case.net.state_dict(), before)
    for name in names:
        weight, keep = weight_of(case.net, name), found[name]
        assert keep.shape == weight.shape
        assert int((~keep).sum()) == int(ratio * weight.numel())
        assert weight[~keep].abs().max() <= weight[keep].abs().min()


def test_of_equal_weights_still_the_exact_share_goes() -> None:
    found = chosen(linear(*[[0.5] * 8] * 8), zeros(0.25, "0"))
    assert int((~found["0"]).sum()) == 16


@pytest.mark.parametrize("pattern", PATTERNS)
def test_of_every_m_input_channels_n_stay_at_each_place_and_output(described: Get, pattern: str) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    case = described("residual")
    names = [layer.name for layer in case.structure.layers if layer.shape[1] % m == 0]
    found = chosen(case.net, zeros(pattern, *names))
    assert {keep.ndim for keep in found.values()} == {2, 4}
    for keep in found.values():
        assert bool((keep.unflatten(1, (-1, m)).sum(2) == n).all())


def test_of_four_the_two_smallest_go() -> None:
    net = linear([1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, -1.0])
    hold(net, chosen(net, zeros("2:4", "0")))
    assert net[0].weight.tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 0.0, 0.0, -1.0]]


def test_on_the_way_to_a_pattern_the_smallest_of_what_it_dooms_go_first() -> None:
    net = linear([1.0, -4.0, 3.0, 2.0, 7.0, 5.0, 6.0, 8.0])
    assert chosen(net, zeros("2:4", "0"), 0.5)["0"].tolist() == [[False, True, True, False, True, True, True, True]]


def test_a_pattern_that_does_not_fit_fails_with_the_layers_name() -> None:
    with pytest.raises(StageError, match="layer '0' cannot be 2:4 sparse: it has 6 input channels") as caught:
        chosen(linear([1.0] * 6), zeros("2:4", "0"))
    assert caught.value.stage == "compress"


@pytest.mark.parametrize(("name", "shape"), [("conv1", (24, 16, 9)), ("fc", (10, 32, 1)), ("conv", (16, 3, 9))])
def test_whole_blocks_go_also_at_ragged_edges_and_at_all_places_of_a_kernel(
    described: Get, name: str, shape: tuple[int, int, int]
) -> None:
    net = described("residual").net
    keep = chosen(net, zeros("block 0.5", name))[name].reshape(shape)
    weight = weight_of(net, name).abs().reshape(shape)
    means: dict[bool, list[float]] = {True: [], False: []}
    for i in range(0, shape[0], BLOCK):
        for j in range(0, shape[1], BLOCK):
            block = keep[i : i + BLOCK, j : j + BLOCK]
            assert bool((block == block.flatten()[0]).all())
            means[bool(block.flatten()[0])].append(float(weight[i : i + BLOCK, j : j + BLOCK].mean()))
    assert max(means[False]) <= min(means[True])
    gone = int((~keep).sum())
    assert 0.5 * keep.numel() - BLOCK * BLOCK * shape[2] < gone <= 0.5 * keep.numel()


def test_by_gradient_a_large_weight_that_the_loss_does_not_feel_goes_first() -> None:
    net = linear([9.0, 0.1, 0.2, 0.3])
    x = nets.rows(32, 4)["input"]
    x[:, 0] = 0
    material = of_tensors(x, torch.zeros(32), lambda output, target: F.mse_loss(output[:, 0], target))
    layers = zeros(0.25, "0")
    assert chosen(net, layers)["0"].tolist() == [[True, False, True, True]]
    assert chosen(net, layers, saliency="gradient", material=material)["0"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("name", [0.5, "2:4", "block 0.5"])
def test_what_was_silenced_stays_silent_on_the_way(name: float | str) -> None:
    net, layers = many(), zeros(name, "0")
    found, shares = chosen(net, layers, 0.0), []
    for part in (0.25, 0.5, 1.0):
        hold(net, found)
        net[0].weight += 0.01  # what was silent is heard again
        earlier, found = found, chosen(net, layers, part, within=found)
        assert not bool((found["0"] & ~earlier["0"]).any())
        shares.append(float((~found["0"]).float().mean()))
    assert shares == pytest.approx([0.125, 0.25, 0.5], abs=0.01)


def test_layers_that_the_model_lacks_or_that_stay_dense_are_passed_over() -> None:
    assert chosen(many(), {**zeros(0.5, "gone"), "0": LayerChoice(weight_bits=4)}) == {}


def test_the_way_is_zhu_and_guptas() -> None:
    assert [cubic(step, 4) for step in (0, 1, 2, 4, 5)] == pytest.approx([0, 1 - 0.75**3, 1 - 0.5**3, 1, 1])


def train(net: nn.Module, steps: int, after_step: Callable[[int, int], None], last: int | None = None) -> list[float]:
    """Steps of plain gradient descent on noise; the share of zeros after each."""
    x = nets.rows(16, 32)["input"]
    parameters = list(net.requires_grad_(True).parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    shares = []
    for step in range(1, (last or steps) + 1):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        after_step(step, steps)
        shares.append(float((net[0].weight == 0).float().mean()))
    net.requires_grad_(False)
    return shares


@pytest.mark.parametrize(("name", "share"), [(0.8, 0.8), ("2:4", 0.5), ("block 0.75", 0.75)])
def test_gradual_zeros_grow_along_the_curve_and_arrive_before_the_end(name: float | str, share: float) -> None:
    net = many()
    gradual = Gradual(net, zeros(name, "0"), begin=0, end=1, saliency="magnitude", material=nothing())
    shares = train(net, 40, gradual)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(share * cubic(1, 30), abs=0.02)
    assert shares[14] == pytest.approx(share * cubic(15, 30), abs=0.02)
    assert shares[28] < share
    assert shares[29:] == pytest.approx([share] * 11, abs=0.001)
    assert same({"0": gradual.masks["0"]}, {"0": net[0].weight != 0})
    assert same(gradual.finish(), {"0": net[0].weight != 0})


def test_gradual_zeros_begin_where_an_earlier_stage_arrived() -> None:
    net, layers = many(), zeros(0.8, "0")
    within = chosen(net, layers, 0.5)
    gradual = Gradual(
        net, layers, begin=0.5, end=1, saliency="magnitude", material=nothing(), within=within
    )  # fmt: skip
    assert float((net[0].weight == 0).float().mean()) == pytest.approx(0.4, abs=0.001)
    assert train(net, 8, gradual)[-1] == pytest.approx(0.8, abs=0.001)
    assert not net[0].weight[~within["0"]].any()


def test_gradual_zeros_arrive_also_where_training_stopped_early() -> None:
    net = many()
    gradual = Gradual(net, zeros(0.8, "0"), begin=0, end=1, saliency="magnitude", material=nothing())
    assert train(net, 40, gradual, last=5)[-1] < 0.5
    gradual.finish()
    assert float((net[0].weight == 0).float().mean()) == pytest.approx(0.8, abs=0.001)


def test_a_rewound_ticket_has_the_weights_of_the_beginning_and_its_zeros() -> None:
    net = nets.seeded(nets.perceptron)
    begin = copy.deepcopy(net.state_dict())
    for tensor in net.state_dict().values():
        tensor.mul_(3)
    layers = zeros(0.5, "0", "3")
    found = chosen(net, layers)
    rewound(net, begin, found)
    for name, tensor in net.state_dict().items():
        keep = found.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, begin[name] if keep is None else begin[name] * keep)


@pytest.mark.parametrize("saliency", ["magnitude", "gradient"])
@pytest.mark.parametrize("name", nets.CASES)
def test_every_kind_of_layer_can_have_zeros(described: Get, name: str, saliency: str) -> None:
    case = described(name)
    for zero in (0.5, "block 0.5"):
        layers = zeros(zero, *(layer.name for layer in case.structure.layers))
        found = chosen(case.net, layers, saliency=saliency, material=of_case(case))
        assert found.keys() == layers.keys()
        assert all(not keep.all() for keep in found.values() if keep.numel() > 2 * BLOCK**2 * 9)

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.factorize import Factored, expand, factorize, full_rank, saves
from tests import nets

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), torch.Size((3, 12))),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), torch.Size((2, 6, 9))),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, 2, 1, bias=False), torch.Size((2, 6, 9, 9))),
    "dilated": (lambda: nn.Conv2d(6, 8, (5, 3), padding=(2, 1), dilation=(1, 2)), torch.Size((2, 6, 9, 9))),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    net = nets.seeded(lambda: nn.Sequential(build())).requires_grad_(False)
    return net, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def low_rank(layer: Any, rank: int) -> None:
    """Make the layer's weight one of that rank, in both ways it is split."""
    shape = layer.weight.shape
    parts = [torch.randn(rank, size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(shape)]
    letters = "abcd"[: len(shape)]
    layer.weight.copy_(torch.einsum(",".join(f"r{x}" for x in letters) + "->" + letters, *parts))


@pytest.mark.parametrize("factors", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_of_low_rank_is_split_exactly(name: str, factors: Any) -> None:
    net, x = made(name)
    low_rank(net[0], 2)
    wanted = net(x)
    shape = net[0].weight.shape
    assert factorize(net, {"0": (2, factors)}) == {"0": ("0.0", "0.1")}
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)
    weights = sum(p.numel() for n, p in net.named_parameters() if n.endswith("weight"))
    assert saves(shape, 2, factors) == (weights < shape.numel())


@pytest.mark.parametrize("factors", ["channel", "spatial"])
def test_more_ranks_are_nearer_and_no_split_of_that_rank_is_better(factors: Any) -> None:
    net, x = made("conv2d")
    wanted = net(x)
    errors = []
    for rank in range(1, full_rank(net[0].weight.shape, factors)):
        smaller = copy.deepcopy(net)
        factorize(smaller, {"0": (rank, factors)})
        errors.append(float((smaller(x) - wanted).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1] > 0


def test_what_cannot_or_need_not_be_split_stays_whole() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Linear(4, 4), nn.ReLU())
    assert factorize(net, {"0": (1, "channel"), "1": (4, "channel"), "2": (1, "channel")}) == {}
    assert expand(net) == {}


def test_factors_know_the_layer_they_are_of() -> None:
    net = nets.seeded(nets.perceptron)
    factorize(net, {"0": (2, "channel")})
    assert isinstance(net[0], Factored)
    assert expand(net) == {"0.0": "0", "0.1": "0"}


def test_torchs_encoder_runs_with_factors() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16)
    low_rank(layer.linear1, 3)
    wanted = layer(x)
    factorize(layer, {"linear1": (3, "channel")})
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)

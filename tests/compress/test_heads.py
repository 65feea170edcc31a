import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.heads import Attention, HeadGroup, cut_heads, find_heads
from autocompress.core.errors import StageError
from tests import nets


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values."""

    def __init__(self, *, baked: bool = False) -> None:
        super().__init__()
        self.heads, self.width, self.baked = 4, 16, baked
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        size = 4 if self.baked else self.width // self.heads
        q, k, v = (y.unflatten(-1, (self.heads, size)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = (q @ k.transpose(-2, -1) / size**0.5).softmax(-1) @ v
        if self.baked:
            mixed = mixed.roll(1, dims=1)  # which head is which matters
        return self.out(mixed.transpose(1, 2).flatten(2))


class Crossed(nn.Module):
    """Keys and values of another width, sequences first."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.attend = nn.Linear(16, 6), nn.MultiheadAttention(16, 4, kdim=6, vdim=6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        other = self.narrow(x)
        return self.attend(x, other, other)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "fused": (Fused, lambda net: net(X)),
    "torch": (encoder, lambda net: net(X)),
    "padded": (encoder, lambda net: net(X, src_key_padding_mask=PADDING)),
    "causal": (encoder, lambda net: net(X, mask=CAUSAL, is_causal=True)),
    "crossed": (Crossed, lambda net: net(X)),
}


@pytest.mark.parametrize("case", CALLS)
def test_cut_heads_give_what_silent_ones_give(case: str) -> None:
    build, call = CALLS[case]
    net = nets.seeded(build).requires_grad_(False)
    groups, refused = find_heads(net, call)
    assert refused == {}
    assert groups
    assert all(group.count == 4 for group in groups)
    whole, cut = copy.deepcopy(net), copy.deepcopy(net)
    cut_heads(whole, groups, {group.name: 4 for group in groups})
    torch.testing.assert_close(call(whole), call(net), rtol=1e-4, atol=1e-5)
    cut_heads(cut, groups, {group.name: 1 for group in groups})
    for group in groups:
        weight = whole.get_submodule(group.name).get_submodule(group.output).get_parameter("weight")
        silent = [head for head in range(4) if head != group.order[0]]
        weight.view(16, 4, 4)[:, silent] = 0
    torch.testing.assert_close(call(cut), call(whole), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in net.parameters())


def test_heads_that_are_not_alike_are_refused_by_name() -> None:
    net = nets.seeded(lambda: nn.Sequential(Fused(baked=True))).requires_grad_(False)
    groups, refused = find_heads(net, lambda model: model(X))
    assert groups == ()
    assert refused["0"].startswith("heads kept: ")


def test_the_heads_with_the_largest_weights_stay() -> None:
    net = nets.seeded(Fused).requires_grad_(False)
    for head, factor in enumerate((0.1, 2.0, 1.0, 0.01)):
        net.out.weight[:, 4 * head : 4 * head + 4] *= factor  # type: ignore[union-attr, operator, index]
        net.qkv.weight.view(3, 4, 4, 16)[:, head] *= factor  # type: ignore[union-attr, operator]
    ((group,), _) = find_heads(net, lambda model: model(X))
    assert group.order == (1, 2, 0, 3)


def test_torchs_attention_is_copied_with_its_weights() -> None:
    source = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    made = Attention(source)
    torch.testing.assert_close(made(X, X, X)[0], source(X, X, X)[0], rtol=1e-4, atol=1e-6)
    assert {p.data_ptr() for p in made.parameters()}.isdisjoint(p.data_ptr() for p in source.parameters())


@pytest.mark.parametrize(
    ("heads", "said"), [({"x": 1}, "no attention heads to cut in 'x'"), ({"a": 5}, "'a' has 4 heads")]
)
def test_what_is_not_there_cannot_be_cut(heads: dict[str, int], said: str) -> None:
    group = HeadGroup(name="a", count=4, order=(0, 1, 2, 3), attribute="", inputs={}, output="o")
    with pytest.raises(StageError, match=said):
        cut_heads(nn.Sequential(), [group], heads)

import torch
from torch import Tensor, nn

from autocompress.compress.depth import find_blocks, skip_blocks
from tests import nets


class Residual(nn.Module):
    """Adds what it computes to its input; or, `plain`, forgets the input."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.plain = nn.BatchNorm2d(4), plain

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(self.two(torch.relu(self.one(x)))) * scale
        return y if self.plain else torch.relu(x + y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3), Residual(), Residual(plain=True)
        self.third, self.head = Residual(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        return self.head(self.third(x, 0.5).mean((2, 3)))


def test_blocks_are_what_gives_its_input_without_its_layers() -> None:
    net = nets.seeded(Net).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    blocks, refused = find_blocks(net, lambda model: model(x))
    assert (blocks, refused) == (("first", "third"), {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_skipped_block_gives_its_input_and_has_no_weights() -> None:
    net = nets.seeded(Net).requires_grad_(False)
    skip_blocks(net, ["third", "first"])
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x), net.head(net.second(torch.relu(net.stem(x))).mean((2, 3))))
    assert not any(name.startswith(("first", "third")) for name, _ in net.named_parameters())


def test_a_block_without_which_the_model_does_not_run_is_refused_by_name() -> None:
    layers = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layers, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    blocks, refused = find_blocks(net, lambda model: model(x))
    assert blocks == ("layers.1",)
    assert refused["layers.0"].startswith("block kept: the model does not run without it")

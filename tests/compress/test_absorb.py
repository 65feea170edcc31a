import torch
from torch import Tensor, nn

from autocompress.compress.absorb import absorb, followers
from tests import nets


class Shared(nn.Module):
    """The first BatchNorm's layer is read by another module too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.other = nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.other(self.two(torch.relu(self.norm(y)))) + y


def lively(net: nn.Module) -> nn.Module:
    """BatchNorms that do something, negative factors among them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_()
            module.running_var.uniform_(0.1, 3)  # type: ignore[union-attr]
    return net.requires_grad_(False)


def test_a_model_computes_what_it_did_and_its_batchnorms_only_add() -> None:
    net = lively(nets.seeded(nets.perceptron))
    x = nets.rows(16, seed=1)["input"]
    wanted = net(x)
    assert absorb(net, lambda model: model(x)) == ("1", "4")
    torch.testing.assert_close(net(x), wanted, rtol=1e-3, atol=1e-4)
    for norm in (net[1], net[4]):
        assert bool((norm.weight == 1).all() and (norm.running_mean == 0).all())
        torch.testing.assert_close((norm.running_var + norm.eps), torch.ones(len(norm.weight)))
    torch.testing.assert_close(net[1](net[0](x)) - net[0](x), net[1].bias.expand(16, -1), rtol=1e-3, atol=1e-4)


def test_a_batchnorm_whose_layer_has_another_reader_stays() -> None:
    net = lively(nets.seeded(Shared))
    x = torch.randn(2, 3, 6, 6)
    before, wanted = net.norm.weight.clone(), net(x)  # type: ignore[union-attr, operator]
    assert followers(net, lambda model: model(x)) == {"one": "norm", "two": "other"}
    assert absorb(net, lambda model: model(x)) == ("other",)
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(net.norm.weight, before)  # type: ignore[union-attr, arg-type]

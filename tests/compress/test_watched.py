"""Who is watched, what is told, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from autocompress.compress.watched import watched


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_each_forward_of_those_that_are_named_is_told(model: nn.Sequential) -> None:
    told: list[str] = []
    x = torch.randn(5, 3)

    def look(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        told.append(name)
        assert torch.equal(module.forward(*inputs), output)

    with watched(model, ["2", "0"], look), torch.no_grad():
        model(x)
        model(x)
    assert told == ["0", "2", "0", "2"]
    model(x)
    assert len(told) == 4


def test_what_is_given_back_changes_nothing(model: nn.Sequential) -> None:
    x = torch.randn(5, 3)
    wanted = model(x)
    with watched(model, ["0"], lambda *_: torch.zeros(1)):  # type: ignore[arg-type, return-value]
        assert torch.equal(model(x), wanted)


def test_nobody_looks_after_a_look_that_raised(model: nn.Sequential) -> None:
    def look(*_: object) -> None:
        raise KeyError

    with pytest.raises(KeyError), watched(model, ["1"], look):
        model(torch.randn(5, 3))
    assert not any(module._forward_hooks for module in model.modules())

"""BatchNorm folded into the weights before it, without a change of topology.

The BatchNorm stays where it is and only adds: γ = σ = 1 and μ = 0. The model computes what it did, its weights are
those of the file that the export makes of it, and there is a bias in every channel.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.outputs import outputs_of
from autocompress.compress.watched import watched

Call = Callable[[nn.Module], Any]
_TOLERANCE = 1e-4
_BatchNorm = nn.modules.batchnorm._BatchNorm


def absorb(model: nn.Module, call: Call) -> tuple[str, ...]:
    """Fold each BatchNorm that follows a convolution or linear layer, in place, and return their names.

    Args:
        model: in eval mode.
        call: runs a model on a sample: outputs have to stay. A BatchNorm where they do not (another module reads the
            layer too) stays as it is.
    """
    pairs = followers(model, call)
    with torch.no_grad():
        wanted = outputs_of(call(model))
        if _absorbed(model, call, pairs.items(), wanted):
            return tuple(pairs.values())
        return tuple(norm for pair in pairs.items() for norm in [pair[1]] if _absorbed(model, call, [pair], wanted))


def followers(model: nn.Module, call: Call) -> dict[str, str]:
    """The BatchNorm that reads what a layer gives, by layer, for layers that run once."""
    given: dict[int, str] = {}
    held: list[Tensor] = []  # an identity is one as long as the tensor lives
    runs: dict[str, int] = {}
    found: dict[str, str] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(module, _BatchNorm):
            if args and id(args[0]) in given:
                found[given[id(args[0])]] = name
        elif isinstance(output, Tensor):
            held.append(output)
            given[id(output)] = name

    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, _BatchNorm)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    with watched(model, names, look), torch.no_grad():
        call(model)
    return {layer: norm for layer, norm in found.items() if runs[layer] == runs[norm] == 1}


def _absorbed(model: nn.Module, call: Call, pairs: Iterable[tuple[str, str]], wanted: list[Tensor]) -> bool:
    """Fold these where all can be, and the outputs stay; else change nothing."""
    modules = [(model.get_submodule(layer), model.get_submodule(norm)) for layer, norm in pairs]
    if not all(isinstance(n, _BatchNorm) and n.affine and n.track_running_stats for _, n in modules):
        return False
    held = list(itertools.chain.from_iterable(modules))
    before = [(tensor, tensor.clone()) for module in held for tensor in module.state_dict().values()]
    for layer, norm in modules:
        _fold(layer, norm)
    got = outputs_of(call(model))
    largest = max(float(w.abs().max()) for w in wanted) + 1e-6
    if all(float((g - w).abs().max()) <= _TOLERANCE * largest for g, w in zip(got, wanted, strict=True)):
        return True
    for tensor, value in before:
        tensor.copy_(value)
    return False


def _fold(layer: Any, norm: Any) -> None:
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factor)
    norm.bias.sub_(norm.running_mean * factor)
    norm.weight.fill_(1)
    norm.running_mean.fill_(0)
    norm.running_var.fill_(1 - norm.eps)

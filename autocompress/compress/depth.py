"""Depth: residual blocks that can be left out, because without their layers they give what they got."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.watched import watched

Call = Callable[[nn.Module], Any]
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
ALIKE = 0.9  # cosine of a silenced block's output and its input, or what a rectifier or a norm leaves of that


def find_blocks(model: nn.Module, call: Call) -> tuple[tuple[str, ...], dict[str, str]]:
    """Residual blocks by name in the order they run, and for each one that cannot be left out, why not.

    A block takes a tensor, and masks perhaps, and gives one of the same shape, holds at least two layers, and gives its
    input, or a rectified or normalised form of it, when its layers and its BatchNorms are silent. Of nested ones the
    inner count.

    Args:
        call: runs a model on a sample of the task.
    """
    seen = _runs(model, call)
    found: dict[str, str] = {}
    blocks: list[str] = []
    for name, (given, got) in seen.items():
        module = model.get_submodule(name)
        if sum(isinstance(m, _WEIGHTED) for m in module.modules()) < 2 or given.shape != got.shape:
            continue
        if any(other.startswith(f"{name}.") for other in blocks):
            continue
        if not _gives_its_input(model, call, name):
            continue
        if reason := _reason(model, call, name):
            found[name] = reason
        else:
            blocks.append(name)
    return tuple(blocks), found


class Skipped(nn.Module):
    """Gives its first input, whatever else it gets."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """The first input."""
        return x


def skip_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Put a `Skipped` in the place of each, in place."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Skipped())


def _runs(model: nn.Module, call: Call) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of each module that ran once and gave one tensor, inner ones first."""
    seen: dict[str, tuple[Tensor, Tensor] | None] = {}

    def look(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        fits = bool(inputs) and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and name not in seen
        seen[name] = (inputs[0], output) if fits else None

    with watched(model, [name for name, _ in model.named_modules() if name], look), torch.no_grad():
        call(model)
    return {name: pair for name, pair in seen.items() if pair is not None and pair[0].is_floating_point()}


def _gives_its_input(model: nn.Module, call: Call, name: str) -> bool:
    """Whether that is so when its layers and its BatchNorms are silent."""
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for module in silenced.get_submodule(name).modules():
            if isinstance(module, (*_WEIGHTED, nn.modules.batchnorm._BatchNorm)):
                for parameter in module.parameters(recurse=False):
                    parameter.zero_()
    pair = _runs(silenced, call).get(name)
    if pair is None:
        return False
    given, got = (tensor.flatten().double() for tensor in pair)
    return max(_cosine(got, form) for form in (given, given.relu())) > ALIKE


def _reason(model: nn.Module, call: Call, name: str) -> str | None:
    """Why a block cannot be left out, None where it can."""
    without = copy.deepcopy(model)
    skip_blocks(without, [name])
    try:
        with torch.no_grad():
            call(without)
    except Exception as error:  # whatever the user's forward raises without the block is the answer
        return f"block kept: the model does not run without it ({type(error).__name__})"
    return None


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(1e-12))

"""Elastic recovery: one training of the user's model that all its widths share; candidates are cut from its weights.

At each step the widest, the narrowest and a few random networks between them learn the original's answers to the same
items, and their gradients meet in the weights they have in common (Yu & Huang, Universally Slimmable Networks, 2019;
Cai et al., Once-for-All, 2020). A narrower network is a slice of the weights, taken in the forward pass: silencing
channels instead costs as much as the whole.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from autocompress.compress.distill import Answers, output_loss
from autocompress.compress.material import Material
from autocompress.compress.outputs import outputs_of
from autocompress.compress.recover import CLIP, optimization
from autocompress.compress.width import ChannelGroup, cut_widths
from autocompress.core.errors import StageError
from autocompress.core.recipe import Train

RANDOM = 2  # networks of random widths a step, beside the widest and the narrowest
Widths = Mapping[str, int]
Axis = tuple[str, int]  # a parameter or buffer, and one of its axes


@dataclass(frozen=True, slots=True)
class _Effect:
    """What one width of one group does to the whole model.

    Attributes:
        kept: for each axis that gets shorter, which of its indices stay.
        changed: for each module, what its sizes change by; a tuple's in its last place.
    """

    kept: Mapping[Axis, Tensor]
    changed: Mapping[tuple[str, str], int]


class Subnets:
    """Narrower networks that are slices of one model's weights.

    Args:
        model: whose weights are shared; what trains them changes all its networks.
        groups: how it can be cut.
        widths: the widths that each group may have.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], widths: Mapping[str, Sequence[int]]) -> None:
        self._model = model
        self._groups = {group.name: group for group in groups}
        self._modules = dict(model.named_modules())
        self._tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        numbered = _numbered(model)
        self._effects = {
            (name, width): self._effect(numbered, name, width)
            for name, choices in widths.items()
            for width in choices
            if width < self._groups[name].width
        }

    def network(self, widths: Widths) -> nn.Module:
        """A module that runs the model at these widths, with the shared weights; gradients go there."""
        return _Subnet(self, {n: w for n, w in widths.items() if w < self._groups[n].width})

    def sliced(self, widths: Widths) -> dict[str, Tensor]:
        """Parameters and buffers at these widths, those that differ only."""
        kept: dict[Axis, Tensor] = {}
        for name, width in widths.items():
            for place, mask in self._effects[name, width].kept.items():
                kept[place] = kept[place] & mask if place in kept else mask
        found: dict[str, Tensor] = {}
        for (key, axis), mask in kept.items():
            tensor = found.get(key, self._tensors[key])
            found[key] = tensor.index_select(axis, mask.nonzero().flatten())
        return found

    @contextlib.contextmanager
    def sized(self, widths: Widths) -> Iterator[None]:
        """Meanwhile the modules say of themselves that they have these widths."""
        before: dict[tuple[str, str], Any] = {}
        for name, width in widths.items():
            for (module, attribute), change in self._effects[name, width].changed.items():
                own = self._modules[module].__dict__
                before.setdefault((module, attribute), own[attribute])
                now = own[attribute]
                own[attribute] = (*now[:-1], now[-1] + change) if isinstance(now, tuple) else now + change
        try:
            yield
        finally:
            for (module, attribute), value in before.items():
                self._modules[module].__dict__[attribute] = value

    def run(self, widths: Widths, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the model gives at these widths."""
        with self.sized(widths):
            return functional_call(self._model, self.sliced(widths), args, named)

    def _effect(self, numbered: nn.Module, name: str, width: int) -> _Effect:
        """Found out by cutting a model whose tensors hold their elements' places: it works for every kind of layer."""
        cut = cut_widths(numbered, [self._groups[name]], {name: width})
        kept = {}
        for key, places in {**dict(cut.named_parameters()), **dict(cut.named_buffers())}.items():
            whole = self._tensors[key]
            if places.shape == whole.shape:
                continue
            indices = np.unravel_index(places.detach().long().numpy(), tuple(whole.shape))
            for axis in range(whole.ndim):
                mask = torch.zeros(whole.shape[axis], dtype=torch.bool)
                mask[torch.from_numpy(np.unique(indices[axis]))] = True
                if not mask.all():
                    kept[key, axis] = mask
        changed = {}
        for path, module in cut.named_modules():
            own = vars(self._modules[path])
            for attribute, value in vars(module).items():
                if (by := _difference(own.get(attribute), value)) != 0:
                    changed[path, attribute] = by
        return _Effect(kept, changed)


class _Subnet(nn.Module):
    """Calls the model at some widths; holds nothing of it."""

    def __init__(self, subnets: Subnets, widths: Widths) -> None:
        super().__init__()
        self._call: Callable[..., Any] = lambda args, named: subnets.run(widths, args, named)

    def forward(self, *args: Any, **named: Any) -> Any:
        return self._call(args, named)


def train_elastic(
    original: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, Sequence[int]],
    material: Material,
    how: Train,
    *,
    steps: int,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda *_: None,
    cache: Path | None = None,
) -> nn.Module:
    """A copy of `original`, trained so that its slices of all `widths` give the original's answers.

    Statistics of BatchNorm are those of the original: settle them for each network that is cut from it.

    Args:
        how: batch size, optimizer and temperature; it always learns from the original's outputs.
        cache: folder for the original's answers.

    Raises:
        StageError: the loss is not finite.
    """
    model = copy.deepcopy(original).requires_grad_(True)
    subnets = Subnets(model, groups, widths)
    answers = Answers(original, material.call, material.items, fixed=material.fixed, folder=cache)
    order, rng = material.orders(how.batch_size, seed), np.random.default_rng(seed)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    optimizer, schedule = optimization(model, parameters, how, steps)
    model.train()
    for step in range(1, steps + 1):
        rows = next(order)
        batch, _ = material.fetch([int(i) for i in rows])
        wanted = answers(rows, batch)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for chosen in _sandwich(widths, rng):
            got = outputs_of(material.call(subnets.network(chosen).train(), batch))
            loss = output_loss(got, wanted, classifies=material.classifies, temperature=how.distill.temperature)
            if not torch.isfinite(loss):
                raise StageError("share", f"the loss is {float(loss.detach())} at step {step}: lower `learning_rate`")
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        progress(step, steps, total)
    answers.save()
    statistics = dict(original.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
    model.zero_grad(set_to_none=True)
    return model.eval().requires_grad_(False)


def _sandwich(widths: Mapping[str, Sequence[int]], rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """The widest, the narrowest, and random ones."""
    yield {name: max(choices) for name, choices in widths.items()}
    yield {name: min(choices) for name, choices in widths.items()}
    for _ in range(RANDOM):
        yield {name: choices[int(rng.integers(len(choices)))] for name, choices in widths.items()}


def _numbered(model: nn.Module) -> nn.Module:
    """A copy in which each element of each tensor is its place in it."""
    numbered = copy.deepcopy(model).double().requires_grad_(False)
    for tensor in (*numbered.parameters(), *numbered.buffers()):
        if tensor.ndim:
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape).to(tensor.dtype))
    return numbered


def _difference(before: Any, now: Any) -> int:
    """How much larger a size is, the last one of several; 0 of what is no size."""
    if isinstance(before, tuple) and isinstance(now, tuple) and len(before) == len(now) > 0:
        before, now = before[-1], now[-1]
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in (before, now))
    return now - before if numbers else 0

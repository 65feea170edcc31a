"""Single weights set to zero: which ones, when, and how they stay zero while the rest trains."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from autocompress.compress.importance import taylor
from autocompress.compress.material import Material
from autocompress.core.candidate import BLOCK, LayerChoice, Sparsity
from autocompress.core.errors import StageError

Saliency = Literal["magnitude", "gradient"]
RAMP = 0.75  # of the steps; in the rest of them the weights that are left train
UPDATES = 16  # how often masks are chosen anew on the way


def masks(
    model: nn.Module,
    layers: Mapping[str, LayerChoice],
    *,
    part: float,
    saliency: Saliency,
    material: Material,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Which weights stay, by layer: booleans in the shape of its weight. The model is not changed.

    Those go that matter least: of small magnitude, or of a small product with their gradient (`importance.taylor`).
    Of a pattern N:M the ones it dooms go in this order; a block counts by its mean.

    Args:
        model: a layer that it does not have is passed over.
        part: of the way to each layer's share of zeros.
        within: earlier masks; what they silenced stays silent.

    Raises:
        StageError: a pattern N:M is wanted of a layer whose input channels are no multiple of M.
    """
    known = dict(model.named_modules())
    wanted = {n: choice.sparsity for n, choice in layers.items() if choice.sparsity is not None and n in known}
    weights = {name: known[name].get_parameter("weight").detach() for name in wanted}
    slopes = taylor(model, material) if wanted and saliency == "gradient" else {}
    found = {}
    for name, zeros in wanted.items():
        score = slopes[f"{name}.weight"].to(weights[name].device) if slopes else weights[name].abs()
        if within is not None and name in within:
            score = score.masked_fill(~within[name].to(score.device), -1.0)
        found[name] = _kept(name, score, zeros, part)
    return found


def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights outside the masks to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.mul_(mask.to(weight.device))


def rewound(model: nn.Module, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Weights and statistics back to `state`, in place, but for the weights outside the masks: those are zero.

    That is a lottery ticket (Frankle & Carbin, The Lottery Ticket Hypothesis, 2019).
    """
    model.load_state_dict(dict(state))
    hold(model, masks)


def cubic(step: int, steps: int) -> float:
    """The part of the way after `step` of `steps`: 1 − (1 − t)³, fast at first (Zhu & Gupta, To prune, 2017)."""
    return 1 - (1 - min(1.0, step / steps)) ** 3


class Gradual:
    """Zeros that grow along `cubic` while a model trains: to be called after each step.

    They arrive at `end` after three quarters of the steps, and the weights that are left train on.

    Attributes:
        masks: which weights stay at this moment.
    """

    masks: dict[str, Tensor]

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerChoice],
        *,
        begin: float,
        end: float,
        saliency: Saliency,
        material: Material,
        within: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`begin` and `end` are parts of the way to each layer's share of zeros; those of `begin` are set here.

        Raises:
            StageError: as `masks`.
        """
        self._model, self._layers, self._begin, self._end = model, layers, begin, end
        self._saliency: Saliency = saliency
        self._material = material
        self.masks = dict(within or {})
        self._choose(begin)

    def __call__(self, step: int, steps: int) -> None:
        """Choose masks anew where it is time, and hold them."""
        ramp = max(1, int(RAMP * steps))
        if step <= ramp and (step == ramp or step % max(1, ramp // UPDATES) == 0):
            self._choose(self._begin + (self._end - self._begin) * cubic(step, ramp))
        hold(self._model, self.masks)

    def finish(self) -> dict[str, Tensor]:
        """The masks at the end of the way, held, also where training stopped before."""
        self._choose(self._end)
        return self.masks

    def _choose(self, part: float) -> None:
        self.masks = masks(
            self._model, self._layers, part=part, saliency=self._saliency, material=self._material, within=self.masks
        )
        hold(self._model, self.masks)


def _kept(name: str, score: Tensor, zeros: Sparsity, part: float) -> Tensor:
    if zeros.kept is not None:
        return _of_every(name, score, *zeros.kept, part)
    if zeros.pattern == "block":
        return _blocks(score, part * zeros.ratio)
    return _without(score, int(part * zeros.ratio * score.numel()))


def _without(score: Tensor, count: int) -> Tensor:
    """All but the `count` of the smallest score; of equal ones the first go."""
    keep = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    keep[score.flatten().argsort(stable=True)[:count]] = False
    return keep.view_as(score)


def _of_every(name: str, score: Tensor, n: int, m: int, part: float) -> Tensor:
    """On the way to n of every m neighbouring input channels, for each output channel and each place of the kernel.

    That is the axis along which NVIDIA's guide wants at most two non-zeros of four.
    """
    if score.ndim < 2 or score.shape[1] % m:
        channels = score.shape[1] if score.ndim > 1 else 1
        raise StageError("compress", f"layer {name!r} cannot be {n}:{m} sparse: it has {channels} input channels")
    last = score.movedim(1, -1)
    neighbours = last.reshape(*last.shape[:-1], -1, m)
    best = neighbours.argsort(dim=-1, descending=True, stable=True)[..., :n]
    stays = torch.zeros_like(neighbours, dtype=torch.bool).scatter_(-1, best, True).flatten(-2).movedim(-1, 1)
    return _without(score.masked_fill(stays, torch.inf), int(part * int((~stays).sum())))


def _blocks(score: Tensor, ratio: float) -> Tensor:
    """Without the blocks of the smallest mean score; never more zeros than the share of `ratio`.

    A block is of BLOCK × BLOCK output and input channels at all places of the kernel; less of them at the far edges.
    """
    by_channel = score.flatten(2).sum(2) if score.ndim > 2 else score
    sums = nn.functional.avg_pool2d(by_channel[None], BLOCK, ceil_mode=True, divisor_override=1)[0]
    sizes = nn.functional.avg_pool2d(torch.ones_like(by_channel)[None], BLOCK, ceil_mode=True, divisor_override=1)[0]
    order = (sums / sizes).flatten().argsort(stable=True)
    gone = sizes.flatten()[order].cumsum(0) <= ratio * by_channel.numel()
    keep = torch.ones(sizes.numel(), dtype=torch.bool, device=score.device)
    keep[order[gone]] = False
    whole = keep.view_as(sizes).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    whole = whole[: score.shape[0], : score.shape[1]]
    return whole.view(*whole.shape, *(1,) * (score.ndim - 2)).expand_as(score).clone()

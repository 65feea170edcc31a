"""Everything of a candidate that changes the shapes of a model: widths, heads, whole blocks, ranks, a student."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

from autocompress.compress.depth import skip_blocks
from autocompress.compress.factorize import expand, factorize
from autocompress.compress.heads import HeadGroup, cut_heads
from autocompress.compress.width import ChannelGroup, cut_widths
from autocompress.core.candidate import Candidate, LayerChoice, Sparsity
from autocompress.core.errors import StageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Where the original can be cut.

    Attributes:
        blocks: residual blocks that can be left out, by name.
        student: the user's own smaller topology, by width.
    """

    groups: tuple[ChannelGroup, ...]
    heads: tuple[HeadGroup, ...] = ()
    blocks: tuple[str, ...] = ()
    student: Callable[[float], nn.Module] | None = None


def cut(model: nn.Module, anatomy: Anatomy, candidate: Candidate, *, before: Candidate) -> nn.Module:
    """A copy of `model`, which is cut as `before` says, in the shapes of `candidate`.

    Raises:
        StageError: the candidate wants what the model does not have.
    """
    if candidate.student is not None:
        if anatomy.student is None:
            text = f"the candidate wants a student of width {candidate.student}, the task has none"
            raise StageError("compress", text)
        # The task may keep what it gives.
        return copy.deepcopy(anatomy.student(candidate.student) if before.student is None else model)
    model = cut_widths(model, anatomy.groups, candidate.widths, before=before.widths)
    if candidate.heads != before.heads:
        cut_heads(model, anatomy.heads, candidate.heads)
    if left := [name for name in candidate.skipped if name not in before.skipped]:
        skip_blocks(model, left)
    ranks = {n: (c.rank, c.factors) for n, c in candidate.layers.items() if c.rank and _own(before, n).rank is None}
    known = dict(model.named_modules())
    factorize(model, {name: how for name, how in ranks.items() if name in known})
    return model


def on_the_way(candidate: Candidate, anatomy: Anatomy, part: float) -> Candidate:
    """The candidate at `part` of the way from the original: heads and ranks come with the last step.

    Widths are rounded up to what a group can keep; blocks go in the order they run, a pattern of zeros when it is
    reached.
    """
    if part == 1 or candidate.student is not None:
        return candidate
    full = {group.name: group for group in anatomy.groups}
    skipped = [name for name in anatomy.blocks if name in candidate.skipped]
    return replace(
        candidate,
        widths={name: _width(full[name], width, part) for name, width in candidate.widths.items() if name in full},
        heads={},
        skipped=tuple(skipped[: math.floor(part * len(skipped))]),
        layers={
            name: replace(choice, rank=None, sparsity=_zeros(choice.sparsity, part))
            for name, choice in candidate.layers.items()
        },
    )


def choices(model: nn.Module, candidate: Candidate) -> dict[str, LayerChoice]:
    """The candidate's choices by the names that `model` has: both factors of a layer have its choice."""
    return {n: candidate.layers[whole] for n, whole in present(model, candidate.layers).items()}


def present(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Those of `layers` that the model has, by the names they have in it: a layer of two factors has two."""
    factors, known = expand(model), {name for name, _ in model.named_modules()}
    wholes = set(factors.values())
    return {
        own: name
        for name in layers
        for own in (([f for f, whole in factors.items() if whole == name]) if name in wholes else [name])
        if own in known
    }


def _own(candidate: Candidate, name: str) -> LayerChoice:
    return candidate.layers.get(name, LayerChoice())


def _width(group: ChannelGroup, target: int, part: float) -> int:
    step = group.partitions
    return min(group.width, step * math.ceil((group.width - part * (group.width - target)) / step))


def _zeros(wanted: Sparsity | None, part: float) -> Sparsity | None:
    if wanted is None or wanted.kept is not None:
        return None
    return replace(wanted, ratio=round(part * wanted.ratio, 4))

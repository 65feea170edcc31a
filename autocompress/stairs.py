"""Width stairs: which channel widths of a model run faster than the next wider one on a device.

A group is timed in the smallest part of the model that holds all its layers, run on what that part gets inside the
model: what one step wins is a tenth of a block and a hundredth of a network, and a hundredth is what noise is.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.bench import Bench, bench_task
from autocompress.core.candidate import Candidate, LayerChoice
from autocompress.core.errors import InputError, StageError
from autocompress.core.measurement import Measurement
from autocompress.core.probe import Stair
from autocompress.core.profile import Profile
from autocompress.core.space import Group, Structure
from autocompress.device.hosts import Host

if TYPE_CHECKING:
    from autocompress.task import CheckedTask

EIGHTHS = 8
# A narrower width stands on a plateau where it wins less than this share of what it would win if latency were linear
# in channels, and surely less than all of that. On a stair of two steps one wins little and the other the rest:
# ResNet-18's blocks of 64 channels won 5, 17, 6, 16, 6 and 17 % of their latency with each 8 channels less (integer
# kernels of ONNX Runtime, AVX2).
PLATEAU = 2 / 3
# Cutting a group that surely wins less than this in its part of the model, at any width, never pays.
LEAST_GAIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module of the model, by name, with what it gets for a few items and how many values those have."""

    name: str
    items: Sequence[Any]
    shapes: tuple[tuple[int, ...], ...]


class Stairs:
    """Times the groups of one model, each kind of group once."""

    def __init__(
        self,
        task: "CheckedTask",
        whole: Bench,
        host: Host,
        folder: Path,
        precision: str,
        policy: Mapping[str, LayerChoice],
    ) -> None:
        """`whole` is the bench of the model itself; widths are timed with its layers as `policy` says, on `host`."""
        self._task = task
        self._whole = whole
        self._host = host
        self._folder = folder
        self._precision = precision
        self._policy = policy
        self._structure: Structure = whole.builder.structure
        names = {name for group in self._structure.groups for name in _holders(group)} - {""}
        self._parts = parts(task, sorted(names))
        self._benches: dict[str, Bench | None] = {"": whole}

    def measure(self, deadline: float) -> tuple[list[Stair], list[str]]:
        """Stairs of the groups, and names of those for which the time did not last."""
        kinds: dict[str, list[Group]] = {}
        for group in self._structure.groups:
            if len(grid(group.width, self._step(group))) > 1:
                kinds.setdefault(self._kind(group), []).append(group)
        found: list[Stair] = []
        left: list[str] = []
        for alike in sorted(kinds.values(), key=lambda groups: self._rank(groups[0])):
            if time.monotonic() >= deadline:
                left += [f"widths of {group.name}" for group in alike]
                continue
            stair = self._stair(alike)
            if stair is None:
                left += [f"widths of {group.name}" for group in alike]
            else:
                found.append(stair)
        return found, left

    def _rank(self, group: Group) -> tuple[bool, float]:
        """Parts before the whole model, which takes longer, and where most widths may lie between stairs, first."""
        step = self._step(group)
        widths = grid(group.width, step)
        return _holders(group)[0] == "", -sum(w % (2 * step) > 0 for w in widths) / len(widths)

    def _step(self, group: Group) -> int:
        return width_step(group, self._whole.profile)

    def _kind(self, group: Group) -> str:
        """Equal for groups that would be timed on equal models: same place in parts of same shapes."""
        part = self._parts.get(_holders(group)[0])
        if part is None:
            return group.name
        layers = [
            (layer.kind, layer.shape, layer.name.removeprefix(part.name))
            for layer in self._structure.layers
            if _within(layer.name, part.name)
        ]
        return json.dumps([group.name.removeprefix(part.name), group.width, group.step, part.shapes, layers])

    def _stair(self, alike: Sequence[Group]) -> Stair | None:
        """Timed in the smallest part that can stand alone; None where even the whole model fails."""
        group = alike[0]
        for holder in _holders(group):
            bench, inner = self._bench(holder), _inside(group.name, holder)
            if bench is None or (inner, group.width) not in {(g.name, g.width) for g in bench.builder.structure.groups}:
                continue
            widths = grid(group.width, self._step(group))
            try:
                taken = self._taken(bench, holder, inner, widths)
            except StageError:
                continue
            if taken:
                return self._made(alike, holder, group.width, taken)
        return None

    def _made(self, alike: Sequence[Group], part: str, full: int, taken: Mapping[int, Measurement]) -> Stair:
        return Stair(
            groups=tuple(group.name for group in alike),
            module=part,
            precision=self._precision,
            widths=(full, *taken),
            ratios=(1.0, *(measured.ratio for measured in taken.values())),
            edges=plateau_edges(taken, full),
        )

    def _taken(self, bench: Bench, holder: str, group: str, widths: Sequence[int]) -> dict[int, Measurement]:
        """Latency at each width over the original one's, which is the first, descending."""
        known = {layer.name for layer in bench.builder.structure.layers}
        chosen = {_inside(n, holder): c for n, c in self._policy.items() if _within(n, holder)}
        layers = {name: choice for name, choice in chosen.items() if name in known}
        others = {w: Candidate(widths={group: w}, layers=layers) for w in widths[1:]}
        return bench.measure(Candidate(layers=layers), others)

    def _bench(self, holder: str) -> Bench | None:
        """A bench of a part, None where it cannot stand alone."""
        if holder not in self._benches:
            part = self._parts.get(holder)
            self._benches[holder] = None if part is None else self._opened(part)
        return self._benches[holder]

    def _opened(self, part: Part) -> Bench | None:
        try:
            task = bench_task(f"part-{len(self._benches)}", self._task.model.get_submodule(part.name), part.items)
            return Bench(task, self._whole.profile, self._host, self._folder / str(len(self._benches)))
        except (InputError, StageError):  # it returns what no task may, or cannot be exported: a larger part can
            return None


def parts(task: "CheckedTask", names: Sequence[str]) -> dict[str, Part]:
    """Those modules of a task's model whose inputs are tensors with the items along their first axis."""
    import torch

    model = task.model
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    items = len(task.split("calibration"))

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if args and not kwargs and all(isinstance(a, torch.Tensor) and a.ndim and len(a) == items for a in args):
            seen[name] = tuple(a.detach().clone() for a in args)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            task.call(model, task.batch("calibration", range(items))[0])
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Part(
            name=name,
            items=[tensors[0][i] if len(tensors) == 1 else tuple(t[i] for t in tensors) for i in range(items)],
            shapes=tuple(tuple(t.shape[1:]) for t in tensors),
        )
        for name, tensors in seen.items()
    }


def width_step(group: Group, profile: Profile) -> int:
    """Widths of a group are multiples of this on a device."""
    return math.lcm(group.step, profile.width_multiple)


def grid(width: int, step: int) -> tuple[int, ...]:
    """Widths to time, descending: the original, the multiples of `step` beside each of its eighths, and above those the
    next even multiple; only the original where all eighths lie on every fourth multiple, where no stair begins between.
    """
    found = {width}
    for eighth in range(1, EIGHTHS):
        below = eighth * width // EIGHTHS // step * step
        for beside in (below, below + step) if below * EIGHTHS != eighth * width else (below,):
            found |= {beside, -(-beside // (2 * step)) * 2 * step}
    found = {w for w in found if 0 < w <= width}
    return tuple(sorted(found, reverse=True)) if any(w % (4 * step) for w in found - {width}) else (width,)


def plateau_edges(measured: Mapping[int, Measurement], full: int) -> tuple[int, ...]:
    """The widest of each plateau, descending.

    Args:
        measured: by width, all timed in one round-robin against the original width `full`.
    """
    if all(m.ratio_ci[0] > 1 - LEAST_GAIN for m in measured.values()):
        return (full,)
    per_channel = max(0.0, 1 - min(m.ratio for m in measured.values())) / (full - min(measured))
    edges = [full]
    for width in sorted(measured, reverse=True):
        linear = per_channel * (edges[-1] - width)
        won, at_most = _won(measured, width, edges[-1])
        if won >= PLATEAU * linear or at_most >= linear:
            edges.append(width)
    return tuple(edges)


def _won(measured: Mapping[int, Measurement], width: int, wider: int) -> tuple[float, float]:
    """What a width wins over a wider one, and the most it can, in latencies of the original width."""
    narrow, wide = measured[width], measured.get(wider)
    if wide is None:
        return 1 - narrow.ratio, 1 - narrow.ratio_ci[0]
    if len(wide.samples) != len(narrow.samples):  # not timed together
        return wide.ratio - narrow.ratio, wide.ratio_ci[1] - narrow.ratio_ci[0]
    beside = replace(narrow, reference=wide.samples, reference_sha256=wide.artifact_sha256)
    return wide.ratio * (1 - beside.ratio), wide.ratio * (1 - beside.ratio_ci[0])


def _holders(group: Group) -> list[str]:
    """Names of the modules that hold all of a group's layers, smallest first; the model itself is last."""
    paths = [name.split(".")[:-1] for name in group.layers]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return [".".join(shared[:i]) for i in range(len(shared), -1, -1)]


def _within(name: str, part: str) -> bool:
    return not part or name.startswith(f"{part}.")


def _inside(name: str, part: str) -> str:
    """A layer's name as its part names it."""
    return name.removeprefix(f"{part}.") if part else name

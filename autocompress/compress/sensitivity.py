"""Probes of one choice at a time: how far the outputs of the original move, and what share of its arithmetic goes.

Nothing is trained and nothing is exported. Precisions are rounded in place, a layer at a time, since what blocks lose
is about the sum of it (as HAWQ and ZeroQ assume: Dong et al., ICCV 2019; Cai et al., CVPR 2020). Shapes are cut from
a copy, and BatchNorm is settled. Of a width, a rank, a number of heads and a share of zeros the smallest and the
middle choice are probed; the root of the loss is interpolated between them, as small changes lose by their square.

Costs put proposals in order and are no measurement. They count multiply-adds, so that latency which has other causes
(memory, conversions between integer and float regions, the operators between layers) is not in them. A layer's integer
kernels take `int8_ratio` of its float ones' share. Where that ratio was not measured they take as many 32nds as
activations have bits: that ranks layers by their arithmetic, and says nothing of how much faster a device is.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autocompress.compress.apply import Setting
from autocompress.compress.cut import choices as present_choices
from autocompress.compress.cut import cut
from autocompress.compress.distill import output_loss
from autocompress.compress.heads import cut_heads
from autocompress.compress.interpolate import anchors, between
from autocompress.compress.multiply_adds import multiply_adds
from autocompress.compress.outputs import outputs_of
from autocompress.compress.rounded import Rounded
from autocompress.compress.settle import settle_batchnorm
from autocompress.compress.sparsify import hold, masks
from autocompress.core.candidate import Candidate, LayerChoice, parse_precision, parse_sparsity
from autocompress.core.errors import StageError
from autocompress.core.recipe import Importance
from autocompress.core.sensitivity import Effect, Sensitivity
from autocompress.core.space import Choice, Space

ITEMS = 128  # calibration items a precision is probed on
CUT_ITEMS = 64  # a cut: it moves outputs further, and its BatchNorm has to be settled on them too
BATCH = 32
ORIGINAL = Effect(loss=0.0, cost=0.0, probed=False)
NOT_PROBED: Mapping[str, str] = {
    "student": "a student has weights of its own: only a trial scores it",
    "float": "float arithmetic is the runtime's: only a trial scores it",
    "calibrator": "every probe takes the lowest and highest value seen",
    "recipe": "a recipe trains: only a trial scores it",
}
NO_TIME = "no time was left for it"

Key = tuple[str, Choice]
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Layers that are rounded together: each has a choice's precision, or its own first where it may not have that."""

    name: str
    layers: tuple[str, ...]
    precisions: tuple[str, ...]


def measure(
    space: Space,
    setting: Setting,
    *,
    task: str,
    target: str,
    int8_ratio: float | None = None,
    seconds: float = math.inf,
    progress: Told = lambda *_: None,
) -> Sensitivity:
    """Probe the variables of `space`, the ones that matter most first; the original is not changed.

    What a layer of the user's raises is a reason in `left_out`, and ends nothing.

    Args:
        int8_ratio: measured latency of uniform INT8 over fp32's, None where it is not known.
        seconds: after which no probe is begun.
        progress: told after each probe how many are done, and of how many.
    """
    return _Probes(space, setting, int8_ratio, time.monotonic(), seconds).run(task, target, progress)


class _Probes:
    def __init__(
        self, space: Space, setting: Setting, int8_ratio: float | None, started: float, seconds: float
    ) -> None:
        self._space, self._setting, self._material = space, setting, setting.material
        self._int8_ratio = int8_ratio
        self._started, self._deadline = started, started + seconds
        self._original = setting.original
        pruning = [stage.prune for stage in space.recipes[0].stages if stage.prune]
        self._importance: Importance = pruning[0].importance if pruning else "magnitude"
        self._units = _units(space)
        batches = [batch for batch, _ in self._material.calibration(ITEMS, BATCH)]
        # BatchNorm cannot be settled on one item.
        self._batches = [batch for batch in batches if _count(batch) > 1] or batches
        self._few = self._batches[: CUT_ITEMS // BATCH]
        self._found: dict[Key, Effect] = {}
        self._failed: dict[Key, str] = {}

    def run(self, task: str, target: str, progress: Told) -> Sensitivity:
        planned = list(dict.fromkeys(self._plan()))
        done = 0
        for key in planned:
            if time.monotonic() >= self._deadline:
                self._failed[key] = NO_TIME
                continue
            try:
                self._found[key] = self._probe(*key)
            except Exception as error:  # whatever a user's layer raises costs this probe and no other
                first = next(iter(str(error).strip().splitlines()), "")
                self._failed[key] = first if isinstance(error, StageError) else f"{type(error).__name__}: {first}"
            done += 1
            progress(done, len(planned))
        effects, left_out = self._tables()
        return Sensitivity(
            task=task,
            target=target,
            effects=effects,
            unit="kl divergence" if self._material.classifies else "squared error",
            probes=done,
            seconds=time.monotonic() - self._started,
            items=sum(_count(batch) for batch in self._batches),
            int8_ratio=self._int8_ratio,
            left_out=left_out,
        )

    def _plan(self) -> Iterator[Key]:
        """What is probed: each layer's first bits, the ends of what is cut, their middles, and further bits."""
        for unit in self._units:
            yield from ((unit.name, p) for p in [p for p in unit.precisions if p != "fp32"][:1])
        cuts = {n: c for n, c in self._space.variables.items() if _kind(n) in _CUTS}
        ends = {name: anchors(self._distances(name)) for name in cuts}
        yield from ((name, found[-1]) for name, found in ends.items() if found)
        yield from ((name, choice) for name, found in ends.items() for choice in found)
        distances = {name: self._distances(name) for name in cuts}
        yield from ((name, choice) for name, cs in cuts.items() for choice in cs if choice not in distances[name])
        for unit in self._units:
            yield from ((unit.name, p) for p in unit.precisions if p != "fp32")

    def _probe(self, name: str, choice: Choice) -> Effect:
        kind, _, rest = name.partition(":")
        if kind in _CUTS:
            return self._cut(kind, rest, choice)
        unit = next(unit for unit in self._units if unit.name == name)
        layers = {n: parse_precision(_allowed(self._space, n, str(choice))) for n in unit.layers}
        if isinstance(self._rounded, str):
            raise StageError("calibrate", self._rounded)
        with self._rounded.at(layers) as model:
            loss = self._divergence(model, ITEMS)
        return Effect(loss=loss, cost=sum(self._share(n) * self._saved(c) for n, c in layers.items()))

    def _cut(self, kind: str, rest: str, choice: Choice) -> Effect:
        candidate = self._candidate(kind, rest, choice)
        anatomy = self._setting.by(self._importance) if candidate.widths else self._setting.anatomy
        model = cut(self._original, anatomy, candidate, before=Candidate()).eval().requires_grad_(False)
        if kind == "sparsity":
            wanted = present_choices(model, candidate)
            hold(model, masks(model, wanted, part=1.0, saliency="magnitude", material=self._material))
            kept = {n: c.sparsity.kept for n, c in candidate.layers.items() if c.sparsity}
            cost = 0.0 - sum(self._share(n) / 2 for n, pattern in kept.items() if pattern == (2, 4))
        else:
            before = self._with_heads if kind == "heads" else self._arithmetic
            cost = (sum(self._count(model).values()) - sum(before.values())) / max(1, sum(self._with_heads.values()))
        return Effect(loss=max(0.0, self._settled(model) - self._floor), cost=max(-1.0, cost))

    def _candidate(self, kind: str, rest: str, choice: Choice) -> Candidate:
        if kind == "width":
            return Candidate(widths={rest: int(choice)})
        if kind == "heads":
            return Candidate(heads={rest: int(choice)})
        if kind == "skip":
            return Candidate(skipped=(rest,))
        if kind == "rank":
            return Candidate(layers={rest: LayerChoice(rank=int(choice), factors=self._space.ranks[rest].factors)})
        zeros = LayerChoice(sparsity=parse_sparsity(choice))
        layers = self._space.members[rest]
        return Candidate(layers={n: zeros for n in layers if choice in self._space.sparsities[n]})

    def _settled(self, model: nn.Module) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settle_batchnorm(model, self._material.call, self._few)
        return self._divergence(model, CUT_ITEMS)

    def _divergence(self, model: nn.Module, items: int) -> float:
        got = self._outputs(model, items)
        wanted = [tensor[: len(g)] for tensor, g in zip(self._wanted, got, strict=True)]
        loss = float(output_loss(got, wanted, classifies=self._material.classifies, temperature=1.0))
        if not math.isfinite(loss):
            raise StageError("compress", f"its outputs diverge by {loss}")
        return max(0.0, loss)

    def _outputs(self, model: nn.Module, items: int) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = [outputs_of(self._material.call(model, batch)) for batch in self._batches[: items // BATCH]]
        return [torch.cat(parts).float() for parts in zip(*found, strict=True)]

    @functools.cached_property
    def _wanted(self) -> list[Tensor]:
        return self._outputs(self._original, ITEMS)

    @functools.cached_property
    def _floor(self) -> float:
        """What settling alone changes, on so few items: no cut is to blame for that."""
        return self._settled(copy.deepcopy(self._original).requires_grad_(False))

    @functools.cached_property
    def _rounded(self) -> Rounded | str:
        layers = [name for unit in self._units for name in unit.layers]
        try:
            return Rounded(self._original, layers, self._material.call, self._batches, self._setting.dialect)
        except Exception as error:  # the user's forward may raise anything; without ranges no bits are probed
            return f"activations could not be observed: {type(error).__name__}: {error}"

    def _count(self, model: nn.Module) -> dict[str, int]:
        one = {name: tensor[:1] for name, tensor in self._batches[0].items()}
        return multiply_adds(model, lambda m: self._material.call(m, one))

    @functools.cached_property
    def _arithmetic(self) -> dict[str, int]:
        return self._count(self._original)

    @functools.cached_property
    def _with_heads(self) -> dict[str, int]:
        """As cutting heads writes attention, in which torch's own does all its arithmetic uncounted."""
        heads = self._setting.anatomy.heads
        if not heads:
            return self._arithmetic
        model = copy.deepcopy(self._original)
        cut_heads(model, heads, {head.name: head.count for head in heads})
        return self._count(model)

    def _share(self, layer: str) -> float:
        return self._arithmetic.get(layer, 0) / max(1, sum(self._with_heads.values()))

    def _saved(self, choice: LayerChoice) -> float:
        """The change of a layer's own latency, as a share of it."""
        if choice.kernel == "float":
            return 0.0
        return (choice.activation_bits / 32 if self._int8_ratio is None else self._int8_ratio) - 1

    def _distances(self, name: str) -> dict[Choice, float]:
        """How far each choice of a variable is from the original, for those that lie on a line with it."""
        kind, choices = _kind(name), self._space.variables[name]
        if kind == "sparsity":
            return {c: float(c) for c in choices if not isinstance(c, str)}
        if kind == "skip":
            return {c: float(c) for c in choices}
        return {c: float(choices[0]) - float(c) for c in choices}

    def _tables(self) -> tuple[dict[str, dict[str, Effect]], dict[str, str]]:
        """Effects by variable, and why there are none, for all variables of the space."""
        effects: dict[str, dict[str, Effect]] = {}
        left_out: dict[str, str] = {}
        for name, choices in self._space.variables.items():
            kind = _kind(name)
            if kind in NOT_PROBED:
                left_out[name] = NOT_PROBED[kind]
                continue
            found, failed = self._precision_table(name) if kind in _BITS else self._cut_table(name)
            ordered = {str(c): found[c] for c in choices if c in found}
            if all(effect is ORIGINAL for effect in ordered.values()):
                left_out[name] = next(iter(failed.values()), NO_TIME)
            else:
                effects[name] = ordered
                left_out |= {f"{name}={choice}": why for choice, why in failed.items()}
        return effects, left_out

    def _cut_table(self, name: str) -> tuple[dict[Choice, Effect], dict[Choice, str]]:
        choices = self._space.variables[name]
        found = {c: self._found[name, c] for c in choices if (name, c) in self._found}
        whole = {0} if _kind(name) in ("sparsity", "skip") else {choices[0]}
        found |= {c: ORIGINAL for c in choices if c in whole}
        found = between(found, self._distances(name))
        failed = {c: self._failed.get((name, c), NO_TIME) for c in choices if c not in found}
        reasons = [self._failed[name, c] for c in choices if (name, c) in self._failed]
        return found, {c: reasons[0] if why == NO_TIME and reasons else why for c, why in failed.items()}

    def _precision_table(self, name: str) -> tuple[dict[Choice, Effect], dict[Choice, str]]:
        kind, _, rest = name.partition(":")
        if kind == "layer":
            parts = [unit for unit in self._units if unit.name == name]
            choices: tuple[str, ...] = self._space.precisions[rest]
        else:
            members = self._space.members[rest]
            parts = [unit for unit in self._units if set(unit.layers) <= set(members)]
            choices = tuple(str(c) for c in self._space.variables[name])
        found: dict[Choice, Effect] = {}
        failed: dict[Choice, str] = {}
        for choice in choices:
            keys = [(u.name, choice if choice in u.precisions else u.precisions[0]) for u in parts]
            if missing := [key for key in keys if key[1] != "fp32" and key not in self._found]:
                failed[choice] = self._failed.get(missing[0], NO_TIME)
                continue
            known = [self._found[key] for key in keys if key[1] != "fp32"]
            found[choice] = known[0] if len(parts) == len(known) == 1 else _sum(known)
        return found, failed


_BITS = ("precision", "layer")
_CUTS = ("width", "heads", "skip", "rank", "sparsity")


def _sum(effects: list[Effect]) -> Effect:
    if not effects:
        return ORIGINAL
    total = Effect(loss=sum(e.loss for e in effects), cost=max(-1.0, sum(e.cost for e in effects)))
    return replace(total, probed=False)


def _units(space: Space) -> tuple[_Unit, ...]:
    """A layer each, but all together where one precision is chosen for the model."""
    found = []
    for block, members in space.members.items():
        if space.precision_by == "model":
            union = tuple(dict.fromkeys(p for n in members for p in space.precisions[n]))
            found.append(_Unit(name=f"precision:{block}", layers=tuple(members), precisions=union))
        else:
            found += [_Unit(name=f"layer:{n}", layers=(n,), precisions=space.precisions[n]) for n in members]
    return tuple(unit for unit in found if len(unit.precisions) > 1)


def _allowed(space: Space, layer: str, precision: str) -> str:
    return precision if precision in space.precisions[layer] else space.precisions[layer][0]


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _count(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))

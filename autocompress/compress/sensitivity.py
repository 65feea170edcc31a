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
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autocompress.compress.apply import Setting
from autocompress.compress.cut import choices as present_choices
from autocompress.compress.cut import cut
from autocompress.compress.distill import output_loss
from autocompress.compress.effects import CUTS, NO_TIME, Key, allowed, planned, tables, units
from autocompress.compress.heads import cut_heads
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
Told = Callable[[int, int], None]


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
        self._units = units(space)
        batches = [batch for batch, _ in self._material.calibration(ITEMS, BATCH)]
        # BatchNorm cannot be settled on one item.
        self._batches = [batch for batch in batches if _count(batch) > 1] or batches
        self._few = self._batches[: CUT_ITEMS // BATCH]
        self._found: dict[Key, Effect] = {}
        self._failed: dict[Key, str] = {}

    def run(self, task: str, target: str, progress: Told) -> Sensitivity:
        plan, done = planned(self._space), 0
        for key in plan:
            if time.monotonic() >= self._deadline:
                self._failed[key] = NO_TIME
                continue
            try:
                self._found[key] = self._probe(*key)
            except Exception as error:  # whatever a user's layer raises costs this probe and no other
                first = next(iter(str(error).strip().splitlines()), "")
                self._failed[key] = first if isinstance(error, StageError) else f"{type(error).__name__}: {first}"
            done += 1
            progress(done, len(plan))
        effects, left_out = tables(self._space, self._found, self._failed)
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

    def _probe(self, name: str, choice: Choice) -> Effect:
        kind, _, rest = name.partition(":")
        if kind in CUTS:
            return self._cut(kind, rest, choice)
        unit = next(unit for unit in self._units if unit.name == name)
        layers = {n: parse_precision(allowed(self._space, n, str(choice))) for n in unit.layers}
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


def _count(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))

"""A candidate applied to the user's model, stage by stage of its recipe. The original stays as it is."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.compress.absorb import absorb
from autocompress.compress.bias import correct_bias
from autocompress.compress.cut import Anatomy, choices, cut, on_the_way
from autocompress.compress.equalize import equalize
from autocompress.compress.importance import ranked
from autocompress.compress.material import Batch, Material
from autocompress.compress.outputs import outputs_of
from autocompress.compress.qat import Aware
from autocompress.compress.quantize import Learned
from autocompress.compress.reconstruct import reconstruct
from autocompress.compress.recover import train
from autocompress.compress.rounding import adaround
from autocompress.compress.settle import settle_batchnorm
from autocompress.compress.sparsify import Gradual, hold, masks, rewound
from autocompress.core.candidate import Candidate, LayerChoice
from autocompress.core.recipe import Importance, Prune, Quantize, Stage, Train, parts

Watch = Callable[[str], AbstractContextManager[None]]
SETTLE_ITEMS = 128  # BatchNorm statistics are estimated anew on so many items
SETTLE_BATCH = 32
SIMULATED_ITEMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """A float model, and how it came about.

    Attributes:
        learned: weight scales and ranges that a stage found, for the export.
        done: the candidate as it was reached: stages that were undone are not in it, and its recipe has the steps
            that were trained.
        notes: what was undone and why, one sentence each.
        fallback: the model before the stage that prepares for bits, where the finished file has to pass its gate.
    """

    model: nn.Module
    learned: Learned = field(default_factory=Learned)
    done: Candidate
    notes: tuple[str, ...] = ()
    fallback: "Compressed | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all candidates of a task share.

    Attributes:
        reference: the original's metric, as `material.validate` gives it.
        dialect: of the device's integer operators.
        progress: told of training: what, step, steps, loss.
        cache: folder for what candidates share, such as outputs of teachers.
        shared: gives the original after a training that all widths share: of so many steps, channels in that order.
    """

    original: nn.Module
    anatomy: Anatomy
    material: Material
    reference: Callable[[], float]
    dialect: Literal["uint8", "int8"] = "uint8"
    progress: Callable[[str, int, int, float], None] = lambda *_: None
    cache: Path | None = None
    shared: Callable[[int, Anatomy, Train], nn.Module] | None = None
    _ranked: dict[Importance, Anatomy] = field(init=False, default_factory=dict, repr=False, compare=False)

    def by(self, importance: Importance) -> Anatomy:
        """The anatomy with channels in order of their importance; found out once."""
        if importance not in self._ranked:
            groups = ranked(self.original, self.anatomy.groups, importance, self.material)
            self._ranked[importance] = replace(self.anatomy, groups=tuple(groups))
        return self._ranked[importance]


@dataclass(slots=True, kw_only=True)
class _State:
    """Where the pipeline stands; `part` is the share of the way to the candidate, `steps` were trained."""

    model: nn.Module
    at: Candidate
    part: float = 0.0
    steps: int = 0
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)

    def copied(self) -> "_State":
        return replace(self, model=copy.deepcopy(self.model))


def apply(candidate: Candidate, setting: Setting, watch: Watch = lambda _: nullcontext()) -> Compressed:
    """The float model a candidate means, in eval mode, made by the stages of its recipe.

    `watch` is entered with "compress", "settle", "recover", "quantize" or "gate" around each part.

    Raises:
        StageError: the candidate cannot be made, or training diverges.
    """
    return _Pipeline(candidate, setting, watch).run()


def rebuilt(candidate: Candidate, setting: Setting, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model of a candidate that was made before, with the weights it had then."""
    model = cut(setting.original, setting.anatomy, candidate, before=Candidate())
    model.load_state_dict(dict(weights))
    return model.eval().requires_grad_(False)


class _Pipeline:
    def __init__(self, candidate: Candidate, setting: Setting, watch: Watch) -> None:
        self._candidate = candidate
        self._watch = watch
        self._setting = setting
        self._material = setting.material
        self._seed = int(candidate.weights_key[:8], 16)
        pruning = [stage.prune for stage in candidate.recipe.stages if stage.prune]
        self._importance: Importance = pruning[0].importance if pruning else "magnitude"
        self._undone: set[str] = set()
        self._notes: list[str] = []
        self._fallback: Compressed | None = None

    def run(self) -> Compressed:
        state = _State(model=copy.deepcopy(self._setting.original), at=Candidate(recipe=self._candidate.recipe))
        stages = self._candidate.recipe.stages
        if not any(stage.prune for stage in stages):
            self._prune(state, Prune(), 1.0)
        for stage in stages:
            state = self._stage(state, stage)
        return replace(self._compressed(state), fallback=self._fallback)

    def _compressed(self, state: _State) -> Compressed:
        return Compressed(
            model=state.model.eval().requires_grad_(False),
            learned=state.learned,
            done=self._done(state),
            notes=tuple(self._notes),
        )

    def _done(self, state: _State) -> Candidate:
        """Bits are the candidate's, unless the stage that prepares for them was undone; steps are those trained."""
        layers = {
            name: replace(choice, rank=_own(state.at, name).rank, sparsity=_own(state.at, name).sparsity)
            for name, choice in self._candidate.layers.items()
        }
        recipe = replace(self._candidate.recipe, recover_steps=state.steps)
        done = replace(state.at, layers=layers, float_precision=self._candidate.float_precision, recipe=recipe)
        undone = any(stage.quantize and stage.name in self._undone for stage in self._candidate.recipe.stages)
        return done.without_bits() if undone else done

    def _stage(self, state: _State, stage: Stage) -> _State:
        steps = round(self._candidate.recipe.recover_steps * (stage.train.share if stage.train else 0) / stage.cycles)
        for cycle, part in enumerate(parts(stage, state.part), 1):
            before = state.copied() if stage.gate is not None else None
            self._cycle(state, stage, part, steps)
            if before is None or stage.gate is None:
                continue
            with self._watch("gate"):
                lost = 100 * (self._setting.reference() - self._material.validate(state.model))
            if lost > stage.gate:
                which = f"stage {stage.name!r}" + (f", cycle {cycle} of {stage.cycles}" if stage.cycles > 1 else "")
                self._notes.append(f"{which} was undone: it lost {lost:.2f} points, the limit is {stage.gate:g}")
                self._undone.add(stage.name)
                return before
            if stage is self._candidate.recipe.last_gate and self._candidate.has_bits:
                good = self._compressed(before)
                self._fallback = replace(good, learned=Learned(), done=good.done.without_bits())
        return state

    def _cycle(self, state: _State, stage: Stage, part: float | None, steps: int) -> None:
        begin = state.part
        if stage.prune is not None and part is not None:
            self._prune(state, stage.prune, part)
        aware = None
        if stage.quantize is not None:
            with self._watch("quantize"):
                aware = self._quantize(state, stage.quantize)
        if stage.train is not None and self._teaches(state, stage.train, aware is not None):
            with self._watch("recover"):
                self._train(state, stage.train, steps, stage.prune, begin)
            if aware is None:
                state.learned = Learned()
        if aware is not None:
            simulated = self._outputs(state.model)
            state.learned = replace(aware.finish(), simulated=simulated)
            hold(state.model, state.masks)

    def _prune(self, state: _State, how: Prune, part: float) -> None:
        """Cut to `part` of the way; single weights too, unless they go while the stage trains."""
        setting, material = self._setting, self._material
        target = on_the_way(self._candidate, setting.anatomy, part)
        cut_before = state.at
        with self._watch("compress"):
            anatomy = setting.by(self._importance) if target.widths else setting.anatomy
        if how.inherit and setting.shared is not None and target.widths and not cut_before.widths:
            with self._watch("share"):
                trained = next((stage.train for stage in self._candidate.recipe.stages if stage.train), Train())
                state.model = setting.shared(how.inherit, anatomy, trained)
        with self._watch("compress"):
            state.model = cut(state.model, anatomy, target, before=cut_before)
            fitted = {}
            if how.reconstruct and target.student is None and target.widths != cut_before.widths:
                fitted = reconstruct(state.model, setting.original, anatomy.groups, target.widths, material)
            changed = target.shape_key != cut_before.shape_key
            state.at, state.part, state.learned = target, part, Learned()
            if changed or how.schedule == "at-once":
                arrived = part if how.schedule == "at-once" else 0.0
                state.masks = self._masks(state, how, arrived) if arrived else {}
                hold(state.model, state.masks)
        # Fitted layers give what the original's BatchNorms know: on fashion_resnet at half the width settling took 0.6
        # points away. After zeros it gave 67 of them (70 % in each layer).
        if (changed and not fitted) or (how.schedule == "at-once" and state.masks):
            with self._watch("settle"):
                batches = material.calibration(SETTLE_ITEMS, SETTLE_BATCH)
                settle_batchnorm(state.model, material.call, (batch for batch, _ in batches))

    def _masks(self, state: _State, how: Prune, part: float) -> dict[str, torch.Tensor]:
        wanted = choices(state.model, self._candidate)
        return masks(state.model, wanted, part=part, saliency=how.saliency, material=self._material)

    def _quantize(self, state: _State, how: Quantize) -> Aware | None:
        material = self._material
        wanted = {n: c for n, c in choices(state.model, self._candidate).items() if c.weight_bits <= 8}
        if not wanted:
            return None
        sample = _first(material)
        absorb(state.model, lambda model: material.call(model, sample))
        if how.equalize:
            equalize(state.model, lambda model: material.call(model, sample))
        reference = copy.deepcopy(state.model)
        if how.rounding == "adaround":
            fine = {n: c for n, c in wanted.items() if c.weight_bits <= 4 and c.levels == "uniform"}
            scales = adaround(state.model, reference, fine, material, self._seed)
            state.learned = replace(state.learned, scales={**state.learned.scales, **scales})
        if how.correct_bias:
            correct_bias(state.model, reference, wanted, material, state.learned)
        if not how.aware:
            return None
        return Aware(
            state.model,
            wanted,
            material,
            state.learned,
            dialect=self._setting.dialect,
            calibrator=self._candidate.recipe.calibrator,
        )

    def _outputs(self, model: nn.Module) -> tuple[NDArray[np.float32], ...]:
        """What the model gives for the first calibration items."""
        batch = next(iter(self._material.calibration(SIMULATED_ITEMS, SIMULATED_ITEMS)))[0]
        with torch.no_grad():
            return tuple(o.float().numpy() for o in outputs_of(self._material.call(model.eval(), batch)))

    def _teaches(self, state: _State, how: Train, aware: bool) -> bool:
        """Whether training has something to change: not where a copy of the original is taught by the original."""
        if self._candidate.recipe.recover_steps == 0:
            return False
        same = state.at.shape_key == Candidate().shape_key and not _sparse(self._candidate)
        only = how.distill.kind != "none" and how.distill.weight == 1 and how.distill.teachers == "original"
        return aware or not (same and only)

    def _train(
        self,
        state: _State,
        how: Train,
        steps: int,
        pruning: Prune | None,
        begin: float,
    ) -> None:
        if pruning is None or pruning.schedule == "at-once" or not _sparse(self._candidate):
            self._teach(state, how, steps, lambda *_: hold(state.model, state.masks))
            return
        if pruning.schedule == "gradual":
            wanted = choices(state.model, self._candidate)
            gradual = Gradual(
                state.model,
                wanted,
                begin=begin,
                end=state.part,
                saliency=pruning.saliency,
                material=self._material,
                within=state.masks,
            )
            self._teach(state, how, steps, gradual)
            state.masks = gradual.finish()
            return
        self._rewind(state, how, steps, pruning)

    def _rewind(self, state: _State, how: Train, steps: int, pruning: Prune) -> None:
        """Train, silence the smallest, go back to the weights of the beginning; then train what is left."""
        begin = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        each = steps // (pruning.rounds + 1)
        for round_ in range(1, pruning.rounds + 1):
            self._teach(state, how, each, lambda *_: hold(state.model, state.masks))
            wanted = choices(state.model, self._candidate)
            state.masks = masks(
                state.model,
                wanted,
                part=state.part * round_ / pruning.rounds,
                saliency=pruning.saliency,
                material=self._material,
                within=state.masks,
            )
            rewound(state.model, begin, state.masks)
        self._teach(state, how, steps - each * pruning.rounds, lambda *_: hold(state.model, state.masks))

    def _teach(self, state: _State, how: Train, steps: int, after_step: Callable[[int, int], None]) -> None:
        if steps == 0:
            return
        setting = self._setting
        trained = train(
            state.model,
            how,
            self._material,
            teachers=(setting.original, *self._material.teachers),
            steps=steps,
            seed=self._seed,
            after_step=after_step,
            progress=lambda step, of, loss: setting.progress("recover", step, of, loss),
            cache=setting.cache,
            resize=self._resized,
        )
        state.steps += trained.steps

    def _resized(self, ratio: float) -> nn.Module:
        """An assistant: the user's student of that width, or the original cut evenly, but not below the candidate."""
        anatomy, student = self._setting.anatomy, self._candidate.student
        if student is not None and anatomy.student is not None:
            return copy.deepcopy(anatomy.student(ratio))
        widths = {}
        for group in anatomy.groups:
            least = self._candidate.widths.get(group.name, group.width)
            wanted = group.partitions * max(1, round(ratio * group.width / group.partitions))
            if wanted < group.width:
                widths[group.name] = max(least, wanted)
        model = cut(self._setting.original, anatomy, Candidate(widths=widths), before=Candidate())
        batches = self._material.calibration(SETTLE_ITEMS, SETTLE_BATCH)
        settle_batchnorm(model, self._material.call, (batch for batch, _ in batches))
        return model


def _own(candidate: Candidate, name: str) -> LayerChoice:
    return candidate.layers.get(name, LayerChoice())


def _sparse(candidate: Candidate) -> bool:
    return any(choice.sparsity for choice in candidate.layers.values())


def _first(material: Material) -> Batch:
    return next(iter(material.calibration(2, 2)))[0]

"""A recipe: how a candidate is made from the original, in stages, and what each stage may cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from autocompress.core.errors import InputError
from autocompress.core.record import RARE

Calibrator = Literal["minmax", "percentile", "mse", "entropy"]
CALIBRATORS: tuple[Calibrator, ...] = ("minmax", "percentile", "mse", "entropy")
Importance = Literal["magnitude", "batchnorm", "taylor", "activation"]
_FORBID = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Cut what the candidate cuts: channels, heads, whole blocks, ranks, single weights.

    Attributes:
        importance: what is kept of channels: those of large weights, of large BatchNorm scales, without which the
            outputs change most to first order (Molchanov et al., 2019), or that vary most where they are read (An et
            al., 2024). Where several stages cut, the first one's holds for all.
        saliency: which single weights go: small ones, or those with a small product with their gradient.
        part: share of the way from the original to the candidate at which this stage arrives.
        schedule: single weights go at once; along Zhu & Gupta's cubic curve while the stage trains; or in rounds,
            after each of which what is left goes back to where it began (Frankle & Carbin, 2019).
        rounds: of `rewind`.
        reconstruct: whether the layers after a cut are fitted to the original's outputs by least squares.
        inherit: steps of one training that all widths of the space share; candidates are cut from its weights. 0: from
            the original's (Yu & Huang, 2019).
    """

    importance: Importance = "magnitude"
    saliency: Literal["magnitude", "gradient"] = "magnitude"
    part: float = 1.0
    schedule: Literal["at-once", "gradual", "rewind"] = "at-once"
    rounds: int = 3
    reconstruct: bool = False
    inherit: int = field(default=0, metadata=RARE)

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise InputError(f"`part` must be in (0, 1], got {self.part}")
        if self.rounds < 1:
            raise InputError(f"`rounds` must be at least 1, got {self.rounds}")
        if self.inherit < 0:
            raise InputError(f"`inherit` must be at least 0 steps, got {self.inherit}")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """What a candidate learns from, besides the labels.

    Attributes:
        kind: nothing but labels; the teacher's outputs (Hinton et al., 2015; squared error where they are no class
            logits); its features too, through learned projections (Romero et al., 2015); or where it attends
            (Zagoruyko & Komodakis, 2017).
        temperature: that softens class logits.
        weight: share of the teacher's part in the loss; the rest is the task's own loss on the labels.
        teachers: the original alone; with the task's further teachers, averaged, or each as it is sure; or "self":
            the candidate itself as it is after half the steps (born again, Furlanello et al., 2018).
        assistants: width ratios of models in between, wide ones first, each taught by the one before (Mirzadeh et
            al., 2019). They share the steps.
    """

    kind: Literal["none", "logits", "features", "attention"] = "logits"
    temperature: float = 4.0
    weight: float = 1.0
    teachers: Literal["original", "mean", "confident", "self"] = "original"
    assistants: tuple[float, ...] = ()

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"`temperature` must be positive, got {self.temperature}")
        if not 0 < self.weight <= 1:
            raise InputError(f"`weight` must be in (0, 1], got {self.weight}; kind: none is for labels only")
        for ratio in self.assistants:
            if not 0 < ratio < 1:
                raise InputError(f"`assistants` are width ratios in (0, 1), got {ratio}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Training, for a share of the candidate's steps.

    Attributes:
        share: of the candidate's `recover_steps`.
        seconds: an end by time as well; what comes first ends it.
        optimizer: "auto" is SGD with momentum for models with BatchNorm, AdamW for others.
        learning_rate: None for 1e-3 with AdamW, 0.05 at a batch of 256 with SGD, less by the root of the batch.
        patience: checks on validation, ten in a training, without a better one after which it stops, with the best
            weights checked; None trains to the end without looking.
    """

    share: float = 1.0
    seconds: float | None = None
    optimizer: Literal["auto", "adamw", "sgd"] = "auto"
    learning_rate: float | None = None
    batch_size: int = 32
    weight_decay: float = 1e-4
    patience: int | None = None
    distill: Distill = field(default_factory=Distill)

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"`share` must be in (0, 1], got {self.share}")
        for name in ("seconds", "learning_rate", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"`{name}` must be positive, got {value}")
        if self.weight_decay < 0:
            raise InputError(f"`weight_decay` must be at least 0, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Prepare weights for the candidate's bits. A recipe without it rounds to nearest while it exports.

    Attributes:
        equalize: ranges of neighbouring layers are made alike (cross-layer equalisation, Nagel et al., 2019).
        rounding: to nearest; or up or down as is best for a layer's outputs, for 4 bits and fewer (AdaRound, Nagel
            et al., 2020).
        correct_bias: the mean error that rounding leaves in each channel is taken off its bias (Nagel et al., 2019).
        aware: the stage's training sees rounded weights and activations, and learns their scales (LSQ, Esser et al.,
            2020); the file has these scales.
    """

    equalize: bool = False
    rounding: Literal["nearest", "adaround"] = "nearest"
    correct_bias: bool = False
    aware: bool = False

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: cut, prepare for bits, train, and look whether it went well; each part only where it is given.

    Attributes:
        cycles: the stage is gone through so many times, each time further: the compression grows evenly to `part`.
        gate: most points of the metric ×100 below the original on validation. A stage that loses more is undone,
            with the cycles after it; what was reached before goes on. Where a stage prepares for bits, the finished
            file has to pass too, scored in its runtime, or it is made again without them.
        when: "pays": only where the candidate's choice of this stage is one that a probe found to pay on the device.
    """

    name: str
    prune: Prune | None = None
    quantize: Quantize | None = None
    train: Train | None = None
    cycles: int = 1
    gate: float | None = None
    when: Literal["always", "pays"] = "always"

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("a stage needs a name")
        if self.cycles < 1:
            raise InputError(f"stage {self.name!r}: `cycles` must be at least 1, got {self.cycles}")
        if self.gate is not None and self.gate < 0:
            raise InputError(f"stage {self.name!r}: `gate` must be at least 0 points, got {self.gate}")
        if self.prune is None and self.quantize is None and self.train is None:
            raise InputError(f"stage {self.name!r} does nothing: give it `prune`, `quantize` or `train`")
        if self.quantize is not None and self.quantize.aware and self.train is None:
            raise InputError(f"stage {self.name!r}: `aware` is about training, give it `train`")


DEFAULT_STAGES = (Stage(name="recover", prune=Prune(), train=Train()),)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a YAML file in recipes/ says: stages in order.

    The first stage that prunes begins at the original, the last one arrives at the candidate; where none does, all
    cutting comes before the first stage.
    """

    name: str
    description: str = ""
    stages: tuple[Stage, ...] = DEFAULT_STAGES

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError(f"recipe {self.name!r} has no stages")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise InputError(f"recipe {self.name!r}: two stages have the same name")
        parts = [stage.prune.part for stage in self.stages if stage.prune]
        if parts != sorted(parts) or (parts and parts[-1] != 1):
            raise InputError(f"recipe {self.name!r}: the `part` of its stages must grow and end at 1, got {parts}")
        share = sum(stage.train.share for stage in self.stages if stage.train)
        if share > 1 + 1e-9:
            raise InputError(f"recipe {self.name!r}: the shares of training add up to {share:g}, at most 1 is there")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a candidate is calibrated and recovered.

    Attributes:
        recover_steps: training steps, shared by the stages that train.
        name: of the plan that the stages are from.
    """

    calibrator: Calibrator = "minmax"
    recover_steps: int = 0
    name: str = field(default="default", metadata=RARE)
    stages: tuple[Stage, ...] = field(default=DEFAULT_STAGES, metadata=RARE)

    def __post_init__(self) -> None:
        if self.recover_steps < 0:
            raise InputError(f"`recover_steps` must be at least 0, got {self.recover_steps}")

    @property
    def quantizes(self) -> bool:
        """Whether weights depend on bits: a stage changes them for their sake."""
        return any(stage.quantize is not None and stage.quantize != Quantize() for stage in self.stages)

    @property
    def last_gate(self) -> Stage | None:
        """The last stage that prepares for bits, where it has a gate: the finished file has to pass it too."""
        last = next((stage for stage in reversed(self.stages) if stage.quantize is not None), None)
        return last if last is not None and last.gate is not None else None


def parts(stage: Stage, begin: float) -> Iterator[float | None]:
    """For each cycle of a stage, the share of the way to the candidate it arrives at; None where it does not prune."""
    for cycle in range(1, stage.cycles + 1):
        yield None if stage.prune is None else begin + (stage.prune.part - begin) * cycle / stage.cycles

"""What became of a candidate: a score, or a failure with its stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError
from autocompress.core.measurement import Interval, Measurement
from autocompress.core.record import RARE

SCHEMA = 1
Role = Literal["candidate", "fp32", "uniform-fp16", "uniform-bf16", "uniform-int8"]
Rung = Literal["oneshot", "short", "full"]
RUNGS: tuple[Rung, ...] = ("oneshot", "short", "full")
BASELINES: tuple[Role, ...] = ("fp32", "uniform-fp16", "uniform-bf16", "uniform-int8")
_EIGHT_BITS = ("int8", "int4", "fp8")  # fp8 where the profile's dialect is that


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of one artifact. What was not measured is None, and `reasons` says why, by field name.

    Attributes:
        accuracy: the task's metric over validation, of the exported file in its runtime.
        accuracy_ci: 95 % paired bootstrap interval: fp32's accuracy plus the interval of the difference to it on
            the same items.
        test_accuracy: the metric on the test split; members of a finished front only.
        latency_ms: ratio to fp32 × fp32's latency in this run, milliseconds per inference at batch 1.
        ratio, ratio_ci: latency over fp32's, from interleaved blocks.
        size_bytes: size of the file.
        items: validation items that accuracy is of, None for all: it was no use to score the others, since the
            interval of these already says that the point is dominated.
        peak_memory_bytes: high-water mark of a fresh process that loads and runs the file, less what the runtime
            itself took before.
        executed: precision that really ran, by layer, read back from the runtime.
        diagnosis: what the runtime noticed of how the file runs, such as into how many pieces LiteRT cuts the graph.
    """

    accuracy: float
    latency_ms: float
    latency_ms_ci: Interval
    ratio: float
    ratio_ci: Interval
    size_bytes: int
    accuracy_ci: Interval | None = None
    test_accuracy: float | None = None
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None
    executed: Mapping[str, str] | None = None
    diagnosis: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    items: int | None = field(default=None, metadata=RARE)

    def __post_init__(self) -> None:
        for name in ("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed"):
            if getattr(self, name) is None and name not in self.reasons:
                raise InputError(f"`{name}` is null without a reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A candidate that could not be scored: in which stage, and what was said."""

    stage: str
    error: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated candidate.

    Attributes:
        artifact: the file, path relative to the run; None when it was never written.
        measurement: raw timing; None when the latency is that of a file of equal kernels, measured before.
        latency_from: sha256 of that file.
        seconds: where the time went, by stage.
        notes: stages of the recipe that were undone, and why; `candidate` is without them.
        rung: of the fidelity ladder: as it was made, after a short recovery, or after a full one. Accuracies of
            different rungs are never compared.
        promoted_from: number of the trial of the rung below.
    """

    number: int
    role: Role
    candidate: Candidate
    outcome: Score | Failure
    artifact: Artifact | None = None
    measurement: Measurement | None = None
    latency_from: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), metadata=RARE)
    rung: Rung = field(default="oneshot", metadata=RARE)
    promoted_from: int | None = field(default=None, metadata=RARE)

    @property
    def score(self) -> Score | None:
        """The score, None for a failure."""
        return self.outcome if isinstance(self.outcome, Score) else None

    @property
    def executed_differs(self) -> dict[str, str] | None:
        """Layers that did not run as was asked, as name → what ran; None where that was not read back.

        Of the vendor's own file nothing was asked.
        """
        if self.score is None or self.score.executed is None:
            return None
        if self.role == "uniform-int8":
            return {}
        integer = {name for name, choice in self.candidate.layers.items() if choice.kernel != "float"}
        asked = {True: _EIGHT_BITS, False: (self.candidate.float_precision,)}
        return {name: ran for name, ran in self.score.executed.items() if ran not in asked[name in integer]}

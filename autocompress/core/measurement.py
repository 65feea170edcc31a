"""A timing is a record, not a number: raw samples in blocks beside those of a reference, with plan and machine.

The unit of evidence is the block: candidate and reference take turns in it, so what slows the machine slows both,
and the block's ratio of lower quartiles is what is left. Statistics are over blocks.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from autocompress.core.errors import InputError

Interval = tuple[float, float]

# A process's own state (memory layout, clock) moves a ratio by up to about 1 %, which its blocks do not show: it is
# added to either side of an interval. Without it 1 of 80 measurements of a file against its copy excluded 1
# (benchmarks/aa.py, beside two busy processes).
DRIFT_FLOOR = 0.01

# Two-sided 95 % quantiles of Student's t for 1…30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePlan:
    """How long to measure. Stops when both minimums are met and the interval is narrow, or at the maximum.

    Attributes:
        warmup_runs, warmup_s: both are met before the first sample.
        turn_s: how long one artifact runs in one turn of a block.
        min_blocks, max_duration_s: at least so many blocks, at most so many seconds (never fewer than 3 blocks);
            a round-robin of more than four artifacts gets so many seconds for every four.
        target_ci: relative half-width of the ratio's 95 % interval at which measuring may stop.
        threads: threads the runtime may use.
        clock: by default that of the process's CPU time for one thread, which a busy machine disturbs far less, and
            the wall clock for several. A device beside the processor (a GPU, an NPU) needs "wall".
        processes: fresh processes over which a front is measured before it is published.
        timeout_s: a job that takes longer is a failure.
    """

    warmup_runs: int = 10
    warmup_s: float = 0.05
    turn_s: float = 0.006
    min_blocks: int = 8
    max_duration_s: float = 1.0
    target_ci: float = 0.025
    threads: int = 1
    clock: Literal["process_cpu", "wall"] | None = None
    processes: int = 3
    timeout_s: float = 120.0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("turn_s", "max_duration_s", "target_ci", "timeout_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` must be positive, got {getattr(self, name)}")
        for name in ("threads", "processes"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.clock == "process_cpu" and self.threads > 1:
            raise InputError(f"`clock` must be 'wall' for more than one thread, got 'process_cpu' for {self.threads}")
        if self.min_blocks < 3:
            raise InputError(f"`min_blocks` must be at least 3 for an interval, got {self.min_blocks}")
        if self.warmup_runs < 1 or self.warmup_s < 0:
            raise InputError(f"warm-up must be at least one run, got {self.warmup_runs} runs, {self.warmup_s} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a machine says of itself; `facts` is flat text: cpu_model, cores, flags, memory, os, runtime versions."""

    facts: Mapping[str, str]

    @property
    def label(self) -> str:
        """One line for people."""
        keys = ("cpu_model", "cores", "os", "runtime")
        return ", ".join(self.facts[k] for k in keys if k in self.facts)

    def changes(self, other: "Fingerprint") -> dict[str, tuple[str | None, str | None]]:
        """Facts that differ, as name → (here, there)."""
        names = sorted(self.facts.keys() | other.facts.keys())
        pairs = {n: (self.facts.get(n), other.facts.get(n)) for n in names}
        return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Latency of one artifact against a reference, raw.

    Attributes:
        samples: for each block, milliseconds per inference of the artifact.
        reference: for each block, milliseconds per inference of the reference, taken in the same block.
        processes: for each block, the number of the fresh process it was taken in.
        clock: `process_cpu` (one thread) or `wall`.
    """

    artifact_sha256: str
    reference_sha256: str
    samples: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]
    processes: tuple[int, ...]
    clock: Literal["process_cpu", "wall"]
    plan: MeasurePlan
    fingerprint: Fingerprint = field(default_factory=lambda: Fingerprint(facts={}))

    def __post_init__(self) -> None:
        if not len(self.samples) == len(self.reference) == len(self.processes):
            raise InputError(
                f"blocks must line up, got {len(self.samples)}, {len(self.reference)} and {len(self.processes)}"
            )
        if len(self.samples) < 3:
            raise InputError(f"an interval needs at least 3 blocks, got {len(self.samples)}")
        if any(not block or min(block) <= 0 for block in (*self.samples, *self.reference)):
            raise InputError("every block must hold positive durations")

    @property
    def log_ratios(self) -> tuple[float, ...]:
        """For each block, log of artifact's over reference's latency."""
        return tuple(log_ratio(a, r) for a, r in zip(self.samples, self.reference, strict=True))

    @property
    def ratio(self) -> float:
        """Latency over the reference's: the trimmed mean of the blocks' log ratios; of several processes, the mean."""
        return math.exp(statistics.fmean(self._by_process()))

    @property
    def ratio_ci(self) -> Interval:
        """95 % interval of the ratio: of the trimmed mean, wider by DRIFT_FLOOR on either side, and stretched over the
        ratios of all processes it was measured in.
        """
        centre, half = math.log(self.ratio), half_width(self.log_ratios) + DRIFT_FLOOR
        ratios = self._by_process()
        return math.exp(min(centre - half, *ratios)), math.exp(max(centre + half, *ratios))

    @property
    def reference_ms(self) -> float:
        """Median of the reference's samples, milliseconds."""
        return statistics.median(s for block in self.reference for s in block)

    @property
    def measured_ms(self) -> float:
        """Median of the artifact's own samples, milliseconds, as the clock read them at that moment."""
        return statistics.median(s for block in self.samples for s in block)

    def _by_process(self) -> list[float]:
        logs = self.log_ratios
        numbers = sorted(set(self.processes))
        return [trimmed_mean([x for x, p in zip(logs, self.processes, strict=True) if p == n]) for n in numbers]


def merge(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several processes from one measurement each, of the same artifact and plan."""
    return dataclasses.replace(
        parts[0],
        samples=tuple(block for part in parts for block in part.samples),
        reference=tuple(block for part in parts for block in part.reference),
        processes=tuple(number for number, part in enumerate(parts) for _ in part.samples),
    )


def log_ratio(samples: Sequence[float], reference: Sequence[float]) -> float:
    """Log of one block's ratio: lower quartile over lower quartile.

    What disturbs a run only ever adds to it. Beside two busy processes, in 0.4 s, the ratio of quartiles has half
    the standard deviation of the ratio of medians (1.1 % against 2.0 %); the minimum has fewer samples behind it.
    """
    return math.log(lower_quartile(samples) / lower_quartile(reference))


def lower_quartile(samples: Sequence[float]) -> float:
    """The sample at rank (n + 1) / 4, between two by proportion; unbiased for any n ≥ 3, the minimum below."""
    ordered = sorted(samples)
    position = max(0.0, (len(ordered) + 1) / 4 - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean of `values` without the lowest and highest fifth (from four values on, at least one of each)."""
    ordered, cut = sorted(values), _trimmed(len(values))
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the trimmed mean of `values`, infinite for fewer than two (Yuen, 1974).

    On a shared machine one block in ten is off by a multiple of what the others differ by. In a plain mean's interval
    those few decide; here they only cost their share.
    """
    n, cut = len(values), _trimmed(len(values))
    kept = n - 2 * cut
    if kept < 2:
        return math.inf
    ordered = sorted(values)
    winsorised = [min(max(v, ordered[cut]), ordered[n - cut - 1]) for v in ordered]
    t = _T95[kept - 2] if kept - 1 <= len(_T95) else 1.96 + 2.4 / (kept - 1)
    return t * statistics.stdev(winsorised) * math.sqrt((n - 1) / (kept * (kept - 1)))


def _trimmed(n: int) -> int:
    return max(1, n // 5) if n >= 4 else 0


def separated(fast: Interval, slow: Interval) -> bool:
    """Whether `fast` lies wholly below `slow`: only then is one called faster than the other."""
    return fast[1] < slow[0]


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]

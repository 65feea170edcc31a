"""The Pareto front of a set of trials, and choosing from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import InputError, NoPointError, unknown
from autocompress.core.measurement import Interval, overlap
from autocompress.core.record import to_json
from autocompress.core.trial import RUNGS, Score, Trial

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One axis of the search: how to read it off a score, and whether more is better."""

    name: str
    unit: str
    maximize: bool
    value: Callable[[Score], float | None]


OBJECTIVES: Mapping[str, Objective] = {
    o.name: o
    for o in (
        Objective(name="accuracy", unit="", maximize=True, value=lambda s: s.accuracy),
        Objective(name="latency", unit="ms", maximize=False, value=lambda s: s.latency_ms),
        Objective(name="size", unit="bytes", maximize=False, value=lambda s: float(s.size_bytes)),
        Objective(name="memory", unit="bytes", maximize=False, value=lambda s: s.peak_memory_bytes),
        Objective(name="energy", unit="mJ", maximize=False, value=lambda s: s.energy_mj),
    )
}
Preference = Literal["knee", "fastest", "smallest", "most-accurate"]


def parse_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """Objectives by name; `accuracy` and `latency` are always among them."""
    for name in names:
        if name not in OBJECTIVES:
            raise InputError(unknown("objective", name, OBJECTIVES))
    if len(set(names)) != len(names) or not {"accuracy", "latency"} <= set(names):
        raise InputError(f"objectives are accuracy,latency and optionally others, each once, got {','.join(names)}")
    return tuple(OBJECTIVES[name] for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a user can accept; None is no limit. Accuracy drop is in percentage points against fp32."""

    max_latency_ms: float | None = None
    max_accuracy_drop: float | None = None
    min_accuracy: float | None = None
    max_size_mb: float | None = None
    max_memory_mb: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"`{f.name}` must be a finite number, got {value}")

    def violations(self, score: Score, fp32: Score | None) -> dict[str, float]:
        """For each limit set, by how much it is broken, as a share of the limit: ≤ 0 is met, inf is not measured.

        An accuracy drop is normalised by one percentage point at least, so that a limit of 0 has a scale.
        """
        if self.max_accuracy_drop is not None and fp32 is None:
            raise InputError("`max_accuracy_drop` needs the fp32 baseline, and this run has none yet")
        found: dict[str, float] = {}
        for name, value, limit in (
            ("max_latency_ms", score.latency_ms, self.max_latency_ms),
            ("max_size_mb", score.size_bytes / MB, self.max_size_mb),
            ("max_memory_mb", None if (m := score.peak_memory_bytes) is None else m / MB, self.max_memory_mb),
        ):
            if limit is not None:
                found[name] = math.inf if value is None else (value - limit) / max(abs(limit), 1e-9)
        if self.max_accuracy_drop is not None and fp32 is not None:
            drop = 100 * (fp32.accuracy - score.accuracy)
            found["max_accuracy_drop"] = (drop - self.max_accuracy_drop) / max(abs(self.max_accuracy_drop), 1.0)
        if self.min_accuracy is not None:
            found["min_accuracy"] = (self.min_accuracy - score.accuracy) / max(abs(self.min_accuracy), 1e-9)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Non-dominated trials, fastest first, with the baselines beside them.

    Attributes:
        objectives: the axes, in the order of the search.
        points: the front.
        baselines: fp32 and uniform-int8, on the front or not.
        probability: for each trial number, the chance that it is on the front, given all intervals.
        ties: for each point that stands for others as well, their numbers: no figure tells them apart.
    """

    objectives: tuple[Objective, ...]
    points: tuple[Trial, ...]
    baselines: Mapping[str, Trial]
    probability: Mapping[int, float]
    ties: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, trials: Sequence[Trial], objectives: Sequence[str] = ("accuracy", "latency")) -> "Front":
        """The front of all scored trials; a trial without one of the objectives' figures is left out."""
        axes = parse_objectives(objectives)
        scored = [t for t in trials if t.score is not None and _losses(t.score, axes) is not None]
        losses = np.array([_losses(t.score, axes) for t in scored if t.score is not None]).reshape(-1, len(axes))
        keep = [t for t, on in zip(scored, nondominated(losses), strict=True) if on]
        keep.sort(key=lambda t: (t.score.latency_ms, -t.score.accuracy, t.number) if t.score else ())
        return cls(
            objectives=axes,
            points=tuple(keep),
            baselines={t.role: t for t in trials if t.role != "candidate" and t.score is not None},
            probability=_probabilities(scored, losses, axes),
        )

    def merged(self) -> "Front":
        """The front with one point for candidates whose intervals overlap in every objective: the likeliest of them.

        Each point that goes is tied with the one it goes for. Baselines are what others are compared with: they stand
        for nobody.
        """
        candidates = [t for t in self.points if t.role == "candidate"]
        kept: list[Trial] = []
        ties: dict[int, tuple[int, ...]] = {}
        for trial in sorted(candidates, key=lambda t: (-self.probability.get(t.number, 0), t.number)):
            like = next((k for k in kept if _tied(k, trial, self.objectives)), None)
            if like is None:
                kept.append(trial)
            else:
                ties[like.number] = (*ties.get(like.number, ()), trial.number)
        numbers = {t.number for t in self.points} - {number for tied in ties.values() for number in tied}
        return replace(self, points=tuple(t for t in self.points if t.number in numbers), ties=ties)

    def pick(
        self,
        limits: Limits | None = None,
        *,
        prefer: Preference | None = None,
        **limit: float,
    ) -> Trial:
        """The point to deploy: among those within the limits, the preferred one.

        Without a preference it is the fastest, or, where only latency, size or memory is limited, the most accurate.

        Raises:
            NoPointError: nothing meets the limits; names the nearest point and the limit that binds.
        """
        if not self.points:
            raise NoPointError("the front is empty: no trial was scored")
        bounds = Limits(**limit) if limits is None else limits
        fp32 = self.baselines["fp32"].score if "fp32" in self.baselines else None
        broken = [(t, s, bounds.violations(s, fp32)) for t in self.points if (s := t.score) is not None]
        fitting = [(t, s) for t, s, v in broken if all(x <= 0 for x in v.values())]
        if not fitting:
            trial, score, excess = min(broken, key=lambda row: max(row[2].values()))
            binding = max(excess, key=lambda name: excess[name])
            raise NoPointError(_nothing_fits(trial, score, binding, getattr(bounds, binding), fp32))
        if prefer is None:
            by_accuracy = bounds.max_accuracy_drop is None and bounds.min_accuracy is None and bounds != Limits()
            prefer = "most-accurate" if by_accuracy else "fastest"
        if prefer == "knee":
            losses = np.array([_losses(s, self.objectives) for _, s in fitting])
            return fitting[knee(losses)][0]
        order: Mapping[str, Callable[[Score], tuple[float, float]]] = {
            "fastest": lambda s: (s.latency_ms, -s.accuracy),
            "smallest": lambda s: (s.size_bytes, -s.accuracy),
            "most-accurate": lambda s: (-s.accuracy, s.latency_ms),
        }
        return min(fitting, key=lambda row: order[prefer](row[1]))[0]

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Volume dominated by the front, up to `reference` (one value per objective, in its own unit)."""
        sign = np.array([-1.0 if o.maximize else 1.0 for o in self.objectives])
        losses = np.array([_losses(t.score, self.objectives) for t in self.points if t.score is not None])
        return hypervolume(losses.reshape(-1, len(sign)), np.asarray(reference, float) * sign)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A scored trial that a candidate of the same rung is compared with."""

    ratio: float
    ratio_ci: Interval
    accuracy: float


def judged(trials: Sequence[Trial]) -> list[Trial]:
    """The baselines, and the trials of the highest rung that has a scored candidate: others are not compared."""
    reached = {t.rung for t in trials if t.role == "candidate" and t.score is not None}
    top = next((rung for rung in reversed(RUNGS) if rung in reached), "oneshot")
    return [t for t in trials if t.role != "candidate" or t.rung == top]


def point_json(trial: Trial, front: Front) -> dict[str, Any]:
    """A POINT of `front --json`: what was not measured is null, with `<field>_reason` beside it."""
    score = trial.score
    assert score is not None
    assert trial.artifact is not None
    point = {
        "trial": trial.number,
        "accuracy": score.accuracy,
        "accuracy_ci": score.accuracy_ci,
        "test_accuracy": score.test_accuracy,
        "latency_ms": score.latency_ms,
        "latency_ms_ci": score.latency_ms_ci,
        "speedup_vs_fp32": 1 / score.ratio,
        "size_bytes": score.size_bytes,
        "peak_memory_bytes": score.peak_memory_bytes,
        "energy_mj": score.energy_mj,
        "front_probability": front.probability.get(trial.number),
        "ties": front.ties.get(trial.number, ()),
        "executed_differs": trial.executed_differs,
        "diagnosis": score.diagnosis,
        "candidate": trial.candidate,
        "artifact": {
            "path": trial.artifact.path,
            "format": trial.artifact.format,
            "sha256": trial.artifact.sha256,
        },
    }
    reasons = {f"{name}_reason".replace("energy_mj", "energy"): text for name, text in score.reasons.items()}
    if "executed_reason" in reasons:
        reasons["executed_differs_reason"] = reasons.pop("executed_reason")
    return dict(to_json(point | reasons))


def nondominated(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of (n, objectives) no other row dominates, all minimised; of equal rows the first is kept.

    In lexicographic order what dominates a row comes before it, and so does an equal row that is kept.
    """
    keep = np.zeros(len(losses), bool)
    if len(losses) == 0:
        return keep
    order = np.lexsort([np.arange(len(losses)), *losses.T[::-1]])
    ordered = losses[order]
    if losses.shape[1] == 2:
        lowest = np.minimum.accumulate(ordered[:, 1])
        keep[order] = ordered[:, 1] < np.concatenate([[np.inf], lowest[:-1]])
        return keep
    kept = np.empty_like(ordered)
    count = 0
    for place, row in zip(order, ordered, strict=True):
        if not (kept[:count] <= row).all(1).any():
            kept[count] = row
            count += 1
            keep[place] = True
    return keep


def knee(losses: NDArray[np.float64]) -> int:
    """Row of (n, objectives) nearest to the ideal point after scaling each objective to [0, 1]."""
    span = np.ptp(losses, axis=0)
    scaled = (losses - losses.min(0)) / np.where(span > 0, span, 1.0)
    return int(np.argmin((scaled**2).sum(1)))


def hypervolume(losses: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Exact volume between points (n, objectives; minimised) and `reference`, by slicing along the last objective."""
    inside = losses[(losses < reference).all(1)]
    if len(inside) == 0:
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    order = inside[np.argsort(inside[:, -1], kind="stable")]
    edges = np.append(order[1:, -1], reference[-1])
    depths = edges - order[:, -1]
    return float(
        sum(depth * hypervolume(order[: i + 1, :-1], reference[:-1]) for i, depth in enumerate(depths) if depth > 0)
    )


def _losses(score: Score, axes: Sequence[Objective]) -> list[float] | None:
    """None where a figure is missing, or is of a part of the items."""
    if score.items is not None:
        return None
    values = [o.value(score) for o in axes]
    if any(v is None for v in values):
        return None
    return [-v if o.maximize else v for o, v in zip(axes, values, strict=True) if v is not None]


def _tied(one: Trial, other: Trial, axes: Sequence[Objective]) -> bool:
    """Whether no objective's intervals part; a figure without one is its own."""
    return all(overlap(a, b) for a, b in zip(_intervals(one, axes), _intervals(other, axes), strict=True))


def _intervals(trial: Trial, axes: Sequence[Objective]) -> list[Interval]:
    score = trial.score
    assert score is not None
    known = {"accuracy": score.accuracy_ci, "latency": score.latency_ms_ci}
    values = {axis.name: axis.value(score) for axis in axes}
    return [known.get(name) or (value or 0.0, value or 0.0) for name, value in values.items()]


def _probabilities(
    trials: Sequence[Trial], losses: NDArray[np.float64], axes: Sequence[Objective], draws: int = 400
) -> dict[int, float]:
    """Share of draws, from the intervals taken as normal, in which each trial is non-dominated."""
    near = _near_front(trials, losses, axes)
    if not near:
        return {}
    rng = np.random.default_rng(0)
    centre, spread = losses[near], np.array([_spread(trials[i], axes) for i in near])
    drawn = centre + rng.standard_normal((draws, *centre.shape)) * spread
    counts = sum(nondominated(d).astype(float) for d in drawn)
    share = np.asarray(counts) / draws
    return {trials[i].number: round(float(share[k]), 3) for k, i in enumerate(near)}


def _near_front(trials: Sequence[Trial], losses: NDArray[np.float64], axes: Sequence[Objective]) -> list[int]:
    """Rows that some draw could put on the front: not dominated even when given three spreads."""
    if len(losses) == 0:
        return []
    spread = np.array([_spread(t, axes) for t in trials])
    hopeful = losses - 3 * spread
    return [i for i in range(len(losses)) if not (((losses + 3 * spread) < hopeful[i]).all(1)).any()]


def _spread(trial: Trial, axes: Sequence[Objective]) -> list[float]:
    score = trial.score
    assert score is not None
    intervals = {"accuracy": score.accuracy_ci, "latency": score.latency_ms_ci}
    return [(ci[1] - ci[0]) / 3.92 if (ci := intervals.get(o.name)) else 0.0 for o in axes]


def _nothing_fits(trial: Trial, score: Score, binding: str, limit: float, fp32: Score | None) -> str:
    drop = "" if fp32 is None else f", {100 * (fp32.accuracy - score.accuracy):.2f} points below fp32"
    return (
        f"No point meets the limits; `{binding}` = {limit:g} binds. The nearest is trial {trial.number}: "
        f"accuracy {score.accuracy:.4f}{drop}, {score.latency_ms:.4g} ms, {score.size_bytes / MB:.4g} MB."
    )

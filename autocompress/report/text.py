"""Figures as people read them: never more digits than the interval carries, and "faster" only where intervals part."""

from collections.abc import Mapping, Sequence
from typing import Literal

from autocompress.core.cascade import Single
from autocompress.core.front import MB, Front
from autocompress.core.measurement import Interval, separated
from autocompress.core.trial import Score, Trial

Verdict = Literal["faster", "even", "slower"]


def accuracy(score: Score) -> str:
    """Accuracy with its interval."""
    if score.accuracy_ci is None:
        return f"{score.accuracy:.4f}"
    return f"{score.accuracy:.4f} [{score.accuracy_ci[0]:.4f}, {score.accuracy_ci[1]:.4f}]"


def latency(score: Score) -> str:
    """Milliseconds with their interval, to three significant digits."""
    low, high = score.latency_ms_ci
    return f"{_digits(score.latency_ms)} [{_digits(low)}, {_digits(high)}]"


def drop(score: Score, fp32: Score | None) -> float | None:
    """Points of accuracy lost against fp32; None without that baseline."""
    return None if fp32 is None else 100 * (fp32.accuracy - score.accuracy)


def size(value: int | None) -> str:
    """Bytes in the unit that keeps three digits."""
    if value is None:
        return "n/a"
    if value < 1000:
        return f"{value} B"
    return f"{_digits(value / MB)} MB" if value >= 999_500 else f"{_digits(value / 1000)} kB"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def shares(seconds_by: Mapping[str, float], most: int = 5) -> str:
    """The largest parts of a time in per cent, and all of it."""
    total = sum(seconds_by.values())
    parts = sorted(seconds_by.items(), key=lambda item: -item[1])[:most]
    named = ", ".join(f"{name} {part / total:.0%}" for name, part in parts if total and part / total >= 0.005)
    return f"{named} of {seconds(total)} in trials" if named else f"{seconds(total)} in trials"


def against_fp32(score: Score) -> tuple[float, Verdict]:
    """How many times faster than fp32, with which it took turns, and whether the interval leaves 1 out."""
    return 1 / score.ratio, _verdict(score.ratio_ci, (1.0, 1.0))


def against(score: Score, other: Score | Single) -> tuple[float, Verdict]:
    """How many times faster than `other`, and whether their intervals part. Both are ratios to the same fp32."""
    return other.ratio / score.ratio, _verdict(score.ratio_ci, other.ratio_ci)


def compared(pair: tuple[float, Verdict] | None) -> str:
    """`1.71x faster`, `1.01x even`, `0.80x slower`; nothing to compare with is `n/a`."""
    return "n/a" if pair is None else f"{pair[0]:.2f}x {pair[1]}"


def baseline(front: Front, role: str) -> Score | None:
    """The score of a baseline, None where it has none."""
    return trial.score if (trial := front.baselines.get(role)) else None


def verdict(front: Front, max_drop: float = 1.0) -> str:
    """One sentence: the fastest point that beats uniform INT8 within `max_drop` points of fp32, or that none does."""
    fp32, int8 = baseline(front, "fp32"), baseline(front, "uniform-int8")
    if fp32 is None or int8 is None:
        missing = " and ".join(name for name, score in (("fp32", fp32), ("uniform-int8", int8)) if score is None)
        return f"Nothing is said about speed against uniform-int8: this run has no {missing} baseline."
    near = [(t, t.score) for t in front.points if t.score and 100 * (fp32.accuracy - t.score.accuracy) <= max_drop]
    winners = [(t, s) for t, s in near if t.role == "candidate" and against(s, int8)[1] == "faster"]
    if not winners:
        return (
            f"No point within {max_drop:g} point of fp32's accuracy is faster than uniform-int8 "
            f"by separated intervals (uniform-int8: {latency(int8)} ms)."
        )
    trial, score = min(winners, key=lambda row: row[1].latency_ms)
    lost = 100 * (fp32.accuracy - score.accuracy)
    slower = against_fp32(score)[1] == "slower"
    which = f"the fastest {'candidate ' * slower}within {max_drop:g} point of fp32's accuracy"
    return (
        f"Trial {trial.number} is {which}{', and fp32 itself is faster' * slower}: {latency(score)} ms, "
        f"{compared(against(score, int8))} than uniform-int8 ({latency(int8)} ms), "
        f"{compared(against_fp32(score))} against fp32, {abs(lost):.2f} points {'gained' if lost < 0 else 'lost'}."
    )


def described(trial: Trial) -> str:
    """What was chosen, in a few words: how many layers at which precision, and the widths; and what ran otherwise."""
    candidate = trial.candidate
    otherwise = len(trial.executed_differs or ())
    remark = f" ({otherwise} layer{'s' * (otherwise > 1)} ran otherwise)" if otherwise else ""
    if trial.role != "candidate":
        return trial.role + remark
    counts: dict[str, int] = {}
    for choice in candidate.layers.values():
        name = choice.precision + (f" sparse {choice.sparsity.name}" if choice.sparsity else "")
        name += " low-rank" if choice.rank else ""
        counts[name] = counts.get(name, 0) + 1
    parts = [f"{n} × {name}" for name, n in sorted(counts.items(), key=lambda kv: -kv[1])]
    if candidate.student is not None:
        parts.insert(0, f"student {candidate.student:g}")
    if candidate.widths:
        parts.append(f"{len(candidate.widths)} group{'s' * (len(candidate.widths) > 1)} narrower")
    if candidate.heads:
        parts.append(f"{len(candidate.heads)} attention{'s' * (len(candidate.heads) > 1)} with fewer heads")
    if candidate.skipped:
        parts.append(f"without {listed(candidate.skipped)}")
    if candidate.recipe.recover_steps:
        parts.append(f"{candidate.recipe.recover_steps} recovery steps")
    if candidate.recipe.name != "default":
        parts.append(f"recipe {candidate.recipe.name}")
    parts += trial.notes
    if candidate.float_precision != "fp32":
        parts.append(f"the rest {candidate.float_precision}")
    return (", ".join(parts) or "as it was") + remark


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in one line, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _digits(value: float) -> str:
    """Three significant digits, zeros included."""
    return f"{value:#.3g}".rstrip(".")


def _verdict(interval: Interval, other: Interval) -> Verdict:
    if separated(interval, other):
        return "faster"
    return "slower" if separated(other, interval) else "even"

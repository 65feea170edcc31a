"""Which candidate is tried next, and on which rung: as it is made, after a short recovery, or after a full one.

The cheap score is of hundreds, the dear one of a dozen. Both are true of what they are scores of, and never compared.
Each rung gets a share of the budget, the higher ones later, since who is promoted is learned from those that were.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.core.candidate import Candidate
from autocompress.core.front import MB, Limits, Objective, parse_objectives
from autocompress.core.space import Space, Values
from autocompress.core.trial import RUNGS, Rung, Score, Trial
from autocompress.optimize.fidelity import LEAST_PAIRS, Rated, band, contributions, rank_correlation, trusted

if TYPE_CHECKING:
    from autocompress.optimize.study import Study

BELOW: Mapping[Rung, Rung] = {"short": "oneshot", "full": "short"}
ABOVE: tuple[Rung, ...] = ("full", "short")
# When a rung may begin, when it has had its share, and the share, all of the budget. What is left is for one-shot.
BEGINS: Mapping[Rung, float] = {"short": 0.12, "full": 0.35}
ENDS: Mapping[Rung, float] = {"short": 0.65, "full": 1.0}
SHARES: Mapping[Rung, float] = {"short": 0.2, "full": 0.55}
# Training the whole original for the steps of a full recovery would take so much of the time of all processes. Pruned
# models take a tenth to a half of that, a fifth in the middle, so that a dozen or two of them fit. With 0.35, and a
# twentieth for the short one, a search of 41 minutes on a slow day ended with 7, and no better front by validation.
FULL_SHARE = 0.13
SHORT_SHARE = 0.125  # of the full steps
FEWEST_STEPS = 32  # a shorter training ends below what fitting layers by least squares gives
MOST_EPOCHS = 30
ORIGINAL_DROP = 0.1  # how far below the original the front of a search without limits is worth recovering
SLACK = 1.5  # of a limit of accuracy: what misses it a little now may meet it after recovery
DEAREST = 1.05  # of fp32's latency or size: what is no better than the original is not worth recovering
SLOWER = 1.1  # a training that another one beside it slows must end in time, too
HOPES = (1.0, 3.0, 9.0)  # spreads above what is expected: those who have not even these are not promoted
TRIED = 16  # promotions looked at until one fits into the time that is left


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Training steps of the rungs that train."""

    short: int
    full: int

    @classmethod
    def of(cls, full: int) -> "Steps":
        """Both by the full one."""
        return cls(short=max(min(FEWEST_STEPS, full), round(SHORT_SHARE * full)), full=full)

    @classmethod
    def within(cls, seconds: float, step_seconds: float, items: int, batch: int) -> "Steps":
        """For a search of so many seconds of all its processes together, where the original takes so long a step."""
        most = max(FEWEST_STEPS, math.ceil(MOST_EPOCHS * items / batch))
        return cls.of(max(FEWEST_STEPS, min(most, int(FULL_SHARE * seconds / step_seconds))))

    def on(self, rung: Rung) -> int:
        """Of a rung, none of the lowest."""
        return {"oneshot": 0, "short": self.short, "full": self.full}[rung]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What to evaluate; `promoted_from` is the number of the same candidate's trial on the rung below."""

    values: Values
    candidate: Candidate
    rung: Rung = "oneshot"
    promoted_from: int | None = None


class Ladder:
    """Proposes attempts on all rungs, by what the record holds.

    Several processes may do so at once: what one has claimed no other one tries.
    """

    def __init__(
        self,
        study: "Study",
        space: Space,
        steps: Steps,
        limits: Limits,
        *,
        progress: Callable[[], float],
        left_s: Callable[[], float],
        by_time: bool,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """`progress` is the share of the budget that is spent, `left_s` the seconds until no trial may run.

        Args:
            by_time: whether shares are of seconds, or of trials.
            log: told of the rank correlations whenever there is one more pair.
        """
        self._study, self._space, self._steps, self._limits = study, space, steps, limits
        self._progress, self._left_s, self._by_time, self._log = progress, left_s, by_time, log
        self._axes = parse_objectives(study.objectives)
        self._told = 0

    def next(self) -> Attempt | None:
        """The next attempt; None where nothing is left that is worth it and fits."""
        self._tell_correlations()
        progress, spent = self._progress(), self._spent()
        total = sum(spent.values()) / max(progress, 1e-9)
        for rung in ABOVE:
            due = SHARES[rung] * total * min(1.0, (progress - BEGINS[rung]) / (ENDS[rung] - BEGINS[rung]))
            if spent[rung] < due and (found := self._promotion(rung)) is not None:
                return found
        leads = self._leads_somewhere()
        if leads and (values := self._study.ask()) is not None:
            return Attempt(values=values, candidate=self._space.decode(values))
        others = ((rung, hope) for hope in HOPES for rung in (ABOVE if leads else ABOVE[:1]))
        return next((found for rung, hope in others if (found := self._promotion(rung, hope)) is not None), None)

    def ended(self, attempt: Attempt) -> None:
        """Let others have what `next` claimed; its trial, if there is one, is in the record."""
        if attempt.promoted_from is not None:
            self._study.release(_key(attempt.rung, attempt.promoted_from))

    def _promotion(self, rung: Rung, hope: float = HOPES[0]) -> Attempt | None:
        """The candidate of the rung below with the largest hoped for gain, of those that the time is enough for."""
        waiting = self._waiting(rung)
        if not waiting:
            return None
        expected, hoped = self._band(waiting, rung, hope)
        others = self._study.claimed()
        held = [self._rated(t) for t in self._study.known if t.score and (t.role != "candidate" or t.rung == rung)]
        held += [point for t, point in zip(waiting, expected, strict=True) if _key(rung, t.number) in others]
        gains = contributions(hoped, held, self._worst())
        for i in sorted(range(len(waiting)), key=lambda i: -gains[i])[:TRIED]:
            number = waiting[i].number
            if gains[i] <= 0:
                return None
            values = self._study.values(number)
            candidate = self._space.decode(values, recover_steps=self._steps.on(rung))
            seconds = self._seconds(waiting[i], candidate, rung)
            if seconds < self._left_s() and self._study.claim(_key(rung, number), values):
                return Attempt(values=values, candidate=candidate, rung=rung, promoted_from=number)
        return None

    def _leads_somewhere(self) -> bool:
        """Whether what is found now can still be recovered fully in the time that is left."""
        took = [sum(t.seconds.values()) for t in self._study.known if t.rung == "full"]
        return not took or statistics.median(took) < self._left_s()

    def _waiting(self, rung: Rung) -> list[Trial]:
        """Candidates of the rung below that were not promoted yet; fp32 must be known."""
        known = self._study.known
        done = {t.promoted_from for t in known if t.rung == rung}
        return [
            t
            for t in known
            if t.role == "candidate" and t.rung == BELOW[rung] and t.number not in done
            if t.score is not None and t.score.items is None and self._measured(t.score)
        ]

    def _band(self, waiting: Sequence[Trial], rung: Rung, hope: float) -> tuple[list[Rated], list[Rated]]:
        """What is expected of each on `rung`, and what may be hoped for, so many spreads above."""
        rated = [self._rated(t) for t in waiting]
        found = band([point.accuracy for point in rated], self._pairs(rung), self._fp32.accuracy)
        expected, hoped = (
            [Rated(accuracy=float(a), costs=point.costs) for a, point in zip(side, rated, strict=True)]
            for side in (found.expected, found.hoped(hope))
        )
        return expected, hoped

    def _pairs(self, rung: Rung) -> list[tuple[float, float]]:
        """Accuracies on the rung below and on this one of those that have both."""
        known = {t.number: t.score for t in self._study.known}
        climbed = [t for t in self._study.known if t.rung == rung and t.promoted_from is not None]
        found = ((known.get(t.promoted_from or 0), t.score) for t in climbed)
        return [(low.accuracy, high.accuracy) for low, high in found if low is not None and high is not None]

    def _tell_correlations(self) -> None:
        """Log how well each rung ranks the next one, whenever a pair is new."""
        pairs = {f"{BELOW[rung]}-{rung}": self._pairs(rung) for rung in reversed(ABOVE)}
        count = sum(len(found) for found in pairs.values())
        if count == self._told:
            return
        self._told = count
        correlations = {name: rank_correlation(found) for name, found in pairs.items()}
        distrusted = [n for n, c in correlations.items() if len(pairs[n]) >= LEAST_PAIRS and not trusted(c)]
        counts = {name: len(found) for name, found in pairs.items()}
        self._log("ladder", pairs=counts, rank_correlation=correlations, distrusted=distrusted)

    def _spent(self) -> dict[Rung, float]:
        """Seconds or trials by rung."""
        spent: dict[Rung, float] = dict.fromkeys(RUNGS, 0.0)
        for trial in self._study.known:
            spent[trial.rung] += sum(trial.seconds.values()) if self._by_time else 1.0
        return spent

    def _seconds(self, trial: Trial, candidate: Candidate, rung: Rung) -> float:
        """What a promotion of `trial` to `candidate` will take.

        Its training on the rung below in proportion, and all the rest as there. Candidates whose weights are the same
        are trained once, whichever comes first.
        """
        rest = sum(trial.seconds.values()) - trial.seconds.get("recover", 0.0)
        if self._trained(candidate, rung) is not None:
            return rest
        below = self._trained(trial.candidate, BELOW[rung])
        if below:
            return rest + SLOWER * below * self._steps.on(rung) / self._steps.on(BELOW[rung])
        like = [t.seconds["recover"] for t in self._study.known if t.rung == rung and "recover" in t.seconds]
        return rest + (statistics.median(like) if like else 0.0)

    def _trained(self, candidate: Candidate, rung: Rung) -> float | None:
        """How long the weights of a candidate were trained on a rung, None where they were not."""
        key = candidate.weights_key
        trained = (t for t in self._study.known if t.rung == rung and "recover" in t.seconds)
        return max((t.seconds["recover"] for t in trained if t.candidate.weights_key == key), default=None)

    @property
    def _fp32(self) -> Score:
        return next(t.score for t in self._study.known if t.role == "fp32" and t.score is not None)

    def _measured(self, score: Score) -> bool:
        return all(axis.value(score) is not None for axis in self._axes)

    def _rated(self, trial: Trial) -> Rated:
        """Accuracy, and the other objectives over those of fp32."""
        assert trial.score is not None
        costs = [_over(axis, trial.score, self._fp32) for axis in self._axes if axis.name != "accuracy"]
        return Rated(accuracy=trial.score.accuracy, costs=tuple(costs))

    def _worst(self) -> Rated:
        """The corner beyond which nothing is worth recovering: what the limits say, with some slack."""
        fp32, limits = self._fp32, self._limits
        floor = fp32.accuracy - ORIGINAL_DROP
        if limits.max_accuracy_drop is not None:
            floor = fp32.accuracy - SLACK * max(limits.max_accuracy_drop, 0.1) / 100
        if limits.min_accuracy is not None:
            floor = fp32.accuracy - SLACK * max(fp32.accuracy - limits.min_accuracy, 0.001)
        ceilings = {
            "latency": None if limits.max_latency_ms is None else limits.max_latency_ms / fp32.latency_ms,
            "size": None if limits.max_size_mb is None else limits.max_size_mb * MB / fp32.size_bytes,
        }
        costs = [ceilings.get(axis.name) or DEAREST for axis in self._axes if axis.name != "accuracy"]
        return Rated(accuracy=floor, costs=tuple(costs))


def _key(rung: Rung, number: int) -> str:
    return f"{rung}-{number}"


def _over(axis: Objective, score: Score, fp32: Score) -> float:
    value, reference = axis.value(score), axis.value(fp32)
    assert value is not None
    return value / reference if reference else 1.0

"""The loop of a search: ask, evaluate, tell, until the budget is spent, the space is empty, or a signal comes."""

import contextlib
import dataclasses
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autocompress.core.candidate import Candidate
from autocompress.core.errors import RunError, TargetError
from autocompress.core.front import Front, nondominated, parse_objectives
from autocompress.core.space import Choice, Space, Values
from autocompress.core.trial import Failure, Role, Score, Trial
from autocompress.progress import Progress, Status
from autocompress.run import Run
from autocompress.signals import Signals

if TYPE_CHECKING:
    from autocompress.optimize.study import Study

WIDTH_RATIOS = (1.0, 0.75, 0.5, 0.25)
FINAL_POINTS = 16
UNIFORM_FLOATS: Mapping[str, Role] = {"fp16": "uniform-fp16", "bf16": "uniform-bf16"}
# In these stages a model or a file runs: on data (training, calibrating, scoring, checking, reading back) or timed.
# The rest is overhead.
WORK = (
    "settle", "recover", "quantize", "gate", "calibrate", "check", "score", "interval", "measure", "read back",
    "finalise",
)  # fmt: skip


class CandidateEvaluator(Protocol):
    """What the loop needs of `autocompress.evaluate.Evaluator`."""

    @property
    def space(self) -> Space:
        """The variables."""

    def evaluate(self, candidate: Candidate, role: Role) -> Trial:
        """One finished trial; a candidate's fault is a Failure in it, never an exception."""

    def finalise(self, trials: Sequence[Trial]) -> list[Trial]:
        """The same trials, measured again in fresh processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When to end. `trials` counts the whole record; several workers may pass it by one trial each.

    Attributes:
        deadline: on time.monotonic(); the trial that is running then is finished.
        parent: process without which this one must not go on.
    """

    trials: int | None = None
    deadline: float = math.inf
    parent: int | None = None

    def spent(self, done: int) -> str | None:
        """Why to stop, None to go on."""
        if self.trials is not None and done >= self.trials:
            return "trials"
        if time.monotonic() >= self.deadline:
            return "time"
        if self.parent is not None and os.getppid() != self.parent:
            return "parent ended"
        return None


class Session:
    """One process's part in a search: baselines, exploration, and the last measuring of the front."""

    def __init__(
        self,
        evaluator: CandidateEvaluator,
        run: Run,
        study: "Study",
        *,
        budget: Budget,
        progress: Progress,
        signals: Signals,
        started: float | None = None,
    ) -> None:
        """`started`, on time.monotonic(), is when preparing began; default is now."""
        self._evaluator = evaluator
        self._run = run
        self._study = study
        self._budget = budget
        self._progress = progress
        self._signals = signals
        now = time.monotonic()
        self._started = now if started is None else started
        self._own = 0
        self._seconds: defaultdict[str, float] = defaultdict(float, prepare=now - self._started)
        self._front = frozenset(t.number for t in points(study.trials(), run.config.objectives))

    def baselines(self) -> None:
        """See that the record has fp32, fp16 and bf16 where the device has them, and the runtime's uniform INT8.

        They are made whatever the budget.

        Raises:
            TargetError: fp32 could not be scored, or an objective cannot be measured here.
        """
        space, known = self._evaluator.space, self._study.trials()
        fp32 = next((t.outcome for t in known if t.role == "fp32" and t.score is not None), None)
        if fp32 is None:
            self._progress.stage("fp32 baseline")
            fp32 = self._evaluate(space.uniform_float("fp32"), Candidate(), "fp32").outcome
        if isinstance(fp32, Failure):
            raise TargetError(f"the fp32 baseline failed in stage {fp32.stage!r}: {fp32.message}")
        for objective in parse_objectives(self._run.config.objectives):
            if objective.value(fp32) is None:
                reason = next(
                    (text for name, text in fp32.reasons.items() if objective.name in name), "no reason given"
                )
                raise TargetError(f"objective {objective.name!r} cannot be measured here: {reason}")
        for precision in (*space.float_precisions, *space.float_unpaid):
            role = UNIFORM_FLOATS.get(precision)
            if role is not None and not any(t.role == role for t in known):
                self._progress.stage(f"uniform {precision}")
                values = space.uniform_float(precision)
                self._evaluate(values, dataclasses.replace(space.decode(values), float_precision=precision), role)
        if not any(t.role == "uniform-int8" for t in known):
            self._progress.stage("uniform INT8 by the runtime's own tool")
            uniform = space.uniform("w8a8")
            self._evaluate(uniform, space.decode(uniform), "uniform-int8")

    def explore(self, seeds: Sequence[Values], alive: Callable[[], None] = lambda: None) -> str:
        """Try the seeds, then what the study proposes. `alive` is called before each trial. Returns why it ended."""
        for values in seeds:
            self._study.enqueue(values)
        steps = self._run.config.recover_steps
        while (reason := self._budget.spent(len(self._study))) is None:
            alive()
            with self._timed("study"):
                asked = self._study.ask()
            if asked is None:
                return "space exhausted"
            self._evaluate(asked, self._evaluator.space.decode(asked, recover_steps=steps), "candidate")
        return reason

    def finalise(self) -> None:
        """Measure front and baselines again and keep that as the run's front."""
        chosen = finalists(self._study.trials(), self._run.config.objectives)
        self._progress.stage(f"measuring {len(chosen)} models of the front again, in fresh processes")
        with self._timed("finalise"):
            final = self._evaluator.finalise(chosen)
        with self._signals.deferred():
            self._run.write_final(final)
            self._run.log("finalised", trials=[t.number for t in final], seconds=self._seconds["finalise"])

    def ended(self, reason: str) -> None:
        """Log how it ended and where the time of this process went."""
        total = time.monotonic() - self._started
        work = sum(self._seconds.get(stage, 0.0) for stage in WORK)
        self._run.log(
            "run_ended",
            reason=reason,
            trials=self._own,
            seconds=total,
            stages=dict(self._seconds),
            overhead=max(0.0, 1 - work / total) if total > 0 else 0.0,
        )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[stage] += time.monotonic() - begin

    def _evaluate(self, values: Values, candidate: Candidate, role: Role) -> Trial:
        finished = self._evaluator.evaluate(candidate, role)
        with self._signals.deferred():
            violations = {}
            if finished.score is not None:
                violations = self._run.config.limits.violations(finished.score, self._fp32(finished))
            with self._timed("study"):
                trial = self._study.tell(finished, values, violations)
            self._own += 1
            for stage, seconds in trial.seconds.items():
                self._seconds[stage] += seconds
            self._report(trial)
        return trial

    def _fp32(self, finished: Trial) -> Score | None:
        if finished.role == "fp32":
            return finished.score
        return next((t.score for t in self._study.known if t.role == "fp32" and t.score is not None), None)

    def _report(self, trial: Trial) -> None:
        fields: dict[str, Any] = {"number": trial.number, "role": trial.role, "seconds": dict(trial.seconds)}
        if trial.notes:
            fields["notes"] = list(trial.notes)
        if isinstance(trial.outcome, Failure):
            self._run.log("failure", **fields, **dataclasses.asdict(trial.outcome))
        else:
            score = trial.outcome
            self._run.log(
                "trial",
                **fields,
                outcome="score",
                accuracy=score.accuracy,
                ratio=score.ratio,
                latency_ms=score.latency_ms,
                size_bytes=score.size_bytes,
                cached=trial.latency_from is not None,
            )
        trials = self._study.known
        front = points(trials, self._run.config.objectives)
        numbers = frozenset(t.number for t in front)
        if numbers != self._front:
            entered, left = sorted(numbers - self._front), sorted(self._front - numbers)
            self._run.log("front_changed", entered=entered, left=left, size=len(front))
            self._front = numbers
        self._progress.trial(trial, self._status(trials, front))

    def _status(self, trials: Sequence[Trial], front: Sequence[Trial]) -> Status:
        elapsed = time.monotonic() - self._started
        left = [self._budget.deadline - time.monotonic()] if self._budget.deadline < math.inf else []
        if self._budget.trials is not None:
            left.append((elapsed - self._seconds["prepare"]) / self._own * max(0, self._budget.trials - len(trials)))
        return Status(
            done=len(trials),
            failures=sum(t.score is None for t in trials),
            budget=self._budget.trials,
            elapsed_s=elapsed,
            eta_s=max(0.0, min(left)) if left else None,
            front=tuple(front),
            baselines={t.role: t.score for t in trials if t.role != "candidate" and t.score is not None},
        )


def seeds(space: Space) -> list[dict[str, Choice]]:
    """Uniform policies: our own all-INT8 first, then each precision at each width ratio, then the students."""
    precisions = list(dict.fromkeys(p for choices in space.precisions.values() for p in choices))
    found = [space.uniform("w8a8")]
    found += [space.uniform(p, ratio) for ratio in WIDTH_RATIOS for p in precisions]
    found += [space.uniform(p) | {"student": width} for width in space.students for p in precisions]
    unique = {tuple(sorted(values.items())): values for values in found}
    return list(unique.values())


def points(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Non-dominated trials, fastest first: what Front.of gives, without the probabilities, which take longer."""
    axes = parse_objectives(objectives)
    scored: list[Trial] = []
    losses: list[list[float]] = []
    for trial in trials:
        figures = [None if trial.score is None else axis.value(trial.score) for axis in axes]
        known = [-v if axis.maximize else v for axis, v in zip(axes, figures, strict=True) if v is not None]
        if len(known) == len(axes):
            scored.append(trial)
            losses.append(known)
    on = nondominated(np.array(losses, np.float64).reshape(-1, len(axes)))
    return sorted((t for t, keep in zip(scored, on, strict=True) if keep), key=_latency)


def finalists(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """What is measured again: the front, others that may belong on it while there is room, and the baselines."""
    front = Front.of(trials, objectives)
    chosen = {t.number: t for t in (*front.baselines.values(), *front.points)}
    by_number = {t.number: t for t in trials}
    for number, _ in sorted(front.probability.items(), key=lambda item: -item[1]):
        if len(chosen) >= FINAL_POINTS:
            break
        if front.probability[number] > 0:
            chosen.setdefault(number, by_number[number])
    return [chosen[number] for number in sorted(chosen)]


def require_fp32(study: "Study") -> None:
    """Raise RunError where the record has no fp32 score to compare with."""
    if not any(t.role == "fp32" and t.score is not None for t in study.trials()):
        raise RunError(f"the study {study.name!r} has no fp32 baseline yet: `autocompress search` makes it first")


def _latency(trial: Trial) -> float:
    return trial.score.latency_ms if trial.score is not None else math.inf

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

from autocompress.begin import beginning, known_elsewhere, read_sensitivity, write_sensitivity
from autocompress.core.candidate import Candidate
from autocompress.core.errors import RunError, TargetError
from autocompress.core.front import MB, Rival, judged, parse_objectives
from autocompress.core.space import Space, Values
from autocompress.core.trial import Failure, Role, Rung, Score, Trial
from autocompress.finals import FINAL_POINTS, finalists, points
from autocompress.ladder import Attempt, Ladder, Steps
from autocompress.progress import Progress, Status
from autocompress.run import Run
from autocompress.signals import Signals

if TYPE_CHECKING:
    from autocompress.core.sensitivity import Sensitivity
    from autocompress.optimize.study import Study

KEPT = 0.2  # of the time at most is for measuring the front again
DROP = 0.1  # of the metric below fp32's: what is worse is of no use where no limit says otherwise
LEAST_DROP = 0.01  # a limit of nothing would leave no room to learn in
RELAXED = 0.2  # as much lower below the top of the ladder: a recovery brings that back
TRIALS_A_LAYER = 2.5  # with fewer, feeling out single choices costs more than it tells
FEELING = 0.1  # of the time at most is for that
A_PROCESS_S = 0.5  # to start one, and to read a file's memory in another
UNIFORM_FLOATS: Mapping[str, Role] = {"fp16": "uniform-fp16", "bf16": "uniform-bf16"}
# In these stages a model or a file runs: on data (training, calibrating, scoring, checking, reading back) or timed.
# The rest is overhead.
WORK = (
    "settle", "share", "recover", "quantize", "gate", "calibrate", "check", "score", "interval", "measure", "read back",
    "finalise",
)  # fmt: skip


class CandidateEvaluator(Protocol):
    """What the loop needs of `autocompress.evaluate.Evaluator`."""

    @property
    def space(self) -> Space:
        """The variables."""

    def evaluate(self, candidate: Candidate, role: Role, *, rivals: Sequence[Rival] = ()) -> Trial:
        """One finished trial; a candidate's fault is a Failure in it, never an exception.

        `rivals` are what it has to be compared with, and no more precisely than that needs.
        """

    @property
    def lessons(self) -> tuple[int, int]:
        """Train items, and how many a training step takes."""

    def step_seconds(self) -> float:
        """Seconds of a training step of the whole original."""

    def sensitivity(self, seconds: float, int8_ratio: float | None) -> "Sensitivity":
        """What each choice alone does to the outputs, as far as it is found out within so many seconds."""

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
        self._front = frozenset(t.number for t in points(judged(study.trials()), run.config.objectives))
        self._sensitivity: Sensitivity | None = None
        if (known := read_sensitivity(run)) is not None:
            self._take_up(known)

    @property
    def budget(self) -> Budget:
        """What the budget is, less the time that is kept for the last measuring."""
        return self._budget

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
        self.guide()
        for values in seeds:
            self._study.enqueue(values)
        ladder = self._ladder()
        while (reason := self._budget.spent(len(self._study))) is None:
            alive()
            with self._timed("study"):
                attempt = self._attempt() if ladder is None else ladder.next()
            if attempt is None:
                reason = "space exhausted" if ladder is None else "nothing left that is worth it and fits"
                self._progress.note(f"{reason}: this ends before the budget is spent")
                return reason
            try:
                self._evaluate(attempt.values, attempt.candidate, "candidate", attempt)
            finally:
                if ladder is not None:
                    ladder.ended(attempt)
        return reason

    def keep_time(self) -> None:
        """Keep as much of the time as measuring the front again takes, by what the baselines took."""
        deadline = self._budget.deadline
        took = [t.seconds for t in self._study.trials() if t.role != "candidate" and t.score is not None]
        if deadline == math.inf or not took:
            return
        plan = self._run.config.profile.measure
        a_file = max(plan.processes * s.get("measure", 0.0) + 2 * s.get("score", 0.0) for s in took) + A_PROCESS_S
        kept = min(FINAL_POINTS * a_file, KEPT * max(0.0, deadline - self._started))
        self._budget = dataclasses.replace(self._budget, deadline=deadline - kept)

    def decide_steps(self, processes: int) -> None:
        """See that a search with recovery has its steps, by the time it has and what a step takes."""
        config = self._run.config
        if config.fidelity == "oneshot" or config.recover_steps:
            return
        with self._timed("recover"):
            seconds = self._evaluator.step_seconds()
        left = self._budget.deadline - time.monotonic()
        steps = Steps.within(left * processes, seconds, *self._evaluator.lessons)
        self._run = self._run.decided(recover_steps=steps.full)
        self._run.log("steps", short=steps.short, full=steps.full, step_seconds=seconds)
        self._progress.note(f"a full recovery takes {steps.full} training steps, a short one {steps.short}")

    def feel_out(self, processes: int) -> None:
        """Find out what each choice alone does, once in a run, where there are trials enough to make use of it."""
        if self._run.config.sampler != "surrogate" or self._sensitivity is not None:
            return
        if (known := known_elsewhere(self._run, self._evaluator.space)) is not None:
            write_sensitivity(self._run, known)
            self._take_up(known)
            return
        space, layers = self._evaluator.space, len(self._evaluator.space.structure.layers)
        took = [sum(t.seconds.values()) for t in self._study.known if t.score is not None]
        a_trial, left = max(*took, 0.001), self._budget.deadline - time.monotonic()
        trials = min(self._budget.trials or math.inf, left * processes / a_trial)
        if not space.variables or trials < TRIALS_A_LAYER * layers:
            why = f"{trials:.0f} trials for {layers} layers are too few to make use of it"
            self._run.log("sensitivity", probes=0, seconds=0.0, skipped=why)
            return
        self._progress.stage("feeling out what each choice alone does")
        uniform = next((t.score for t in self._study.known if t.role == "uniform-int8" and t.score), None)
        with self._timed("sensitivity"):
            limit = FEELING * min(left, trials * a_trial / processes)
            found = self._evaluator.sensitivity(limit, uniform.ratio if uniform else None)
        self._run.log("sensitivity", probes=found.probes, seconds=found.seconds, left_out=found.left_out)
        self._progress.note(f"{found.probes} choices felt out one by one in {found.seconds:.1f} s")
        write_sensitivity(self._run, found)
        self._take_up(found)

    def seeds(self) -> list[Values]:
        """What is tried first."""
        return beginning(self._run, self._evaluator.space, self._sensitivity)

    def _take_up(self, found: "Sensitivity") -> None:
        self._sensitivity = found

    def guide(self) -> None:
        """Tell the sampler what is known by now: single choices, and what is of use at all."""
        from autocompress.optimize.sampler import Guide

        space, known = self._evaluator.space, self._sensitivity
        fp32 = next((t.score for t in self._study.known if t.role == "fp32" and t.score is not None), None)
        effects = (
            {}
            if known is None
            else {
                variable: {choice: (e.loss, e.cost) for choice, e in of.items()}
                for variable, of in known.effects.items()
            }
        )
        blocks = {layer: block for block, members in space.members.items() for layer in members}
        bounds, best = ({}, None) if fp32 is None else (self._bounds(fp32), fp32.accuracy)
        self._study.guide(Guide(effects=effects, bounds=bounds, best_accuracy=best, blocks=blocks))

    def _bounds(self, fp32: Score) -> dict[str, float]:
        """The worst of each objective that is of use, relaxed by what a recovery may bring back."""
        config = self._run.config
        limits, relaxed = config.limits, 0.0 if config.fidelity == "oneshot" else RELAXED
        drop = DROP if limits.max_accuracy_drop is None else limits.max_accuracy_drop / 100
        floor = fp32.accuracy - max(drop, LEAST_DROP) - relaxed
        if limits.min_accuracy is not None:
            floor = min(limits.min_accuracy, fp32.accuracy - LEAST_DROP) - relaxed
        bounds = {"accuracy": floor}
        for objective in parse_objectives(config.objectives):
            value = objective.value(fp32)
            if objective.name != "accuracy" and value is not None:
                bounds[objective.name] = value
        if limits.max_latency_ms is not None:
            bounds["latency"] = min(bounds["latency"], limits.max_latency_ms)
        if limits.max_size_mb is not None and "size" in bounds:
            bounds["size"] = min(bounds["size"], MB * limits.max_size_mb)
        return bounds

    def _attempt(self) -> Attempt | None:
        values = self._study.ask()
        return None if values is None else Attempt(values=values, candidate=self._evaluator.space.decode(values))

    def _ladder(self) -> Ladder | None:
        config, budget, began = self._run.config, self._budget, time.monotonic()
        if config.fidelity == "oneshot":
            return None

        def progress() -> float:
            shares = [len(self._study.known) / budget.trials] if budget.trials else []
            if budget.deadline < math.inf:
                shares.append((time.monotonic() - began) / max(1e-9, budget.deadline - began))
            return min(1.0, max(shares, default=0.0))

        return Ladder(
            self._study,
            self._evaluator.space,
            Steps.of(config.recover_steps),
            config.limits,
            progress=progress,
            left_s=lambda: budget.deadline - time.monotonic(),
            by_time=budget.deadline < math.inf,
            log=self._run.log,
        )

    def finalise(self) -> None:
        """Measure front and baselines again and keep that as the run's front."""
        chosen = finalists(judged(self._study.trials()), self._run.config.objectives)
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

    def _evaluate(self, values: Values, candidate: Candidate, role: Role, attempt: Attempt | None = None) -> Trial:
        rung = "oneshot" if attempt is None else attempt.rung
        finished = self._evaluator.evaluate(candidate, role, rivals=self._rivals(rung) if role == "candidate" else ())
        if attempt is not None:
            finished = dataclasses.replace(finished, rung=rung, promoted_from=attempt.promoted_from)
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

    def _rivals(self, rung: Rung) -> list[Rival]:
        """The non-dominated trials of a rung, and the baselines."""
        same = [t for t in self._study.known if t.role != "candidate" or t.rung == rung]
        scores = [t.score for t in points(same, self._run.config.objectives)]
        return [Rival(ratio=s.ratio, ratio_ci=s.ratio_ci, accuracy=s.accuracy) for s in scores if s is not None]

    def _fp32(self, finished: Trial) -> Score | None:
        if finished.role == "fp32":
            return finished.score
        return next((t.score for t in self._study.known if t.role == "fp32" and t.score is not None), None)

    def _report(self, trial: Trial) -> None:
        fields: dict[str, Any] = {"number": trial.number, "role": trial.role, "seconds": dict(trial.seconds)}
        if trial.rung != "oneshot":
            fields |= {"rung": trial.rung, "promoted_from": trial.promoted_from}
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
        front = points(judged(trials), self._run.config.objectives)
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


def require_fp32(study: "Study") -> None:
    """Raise RunError where the record has no fp32 score to compare with."""
    if not any(t.role == "fp32" and t.score is not None for t in study.trials()):
        raise RunError(f"the study {study.name!r} has no fp32 baseline yet: `autocompress search` makes it first")

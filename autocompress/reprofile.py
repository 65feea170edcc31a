"""Measure a front or a package again, here or with another profile: what changed, and what still holds."""

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.core.artifact import Artifact
from autocompress.core.errors import InputError, StageError, TargetError, TaskError
from autocompress.core.front import Front, Limits
from autocompress.core.measurement import Interval, Measurement
from autocompress.core.profile import Profile
from autocompress.core.trial import Role, Score, Trial
from autocompress.device.hosts import Host, open_host
from autocompress.place import check_runtime, placed
from autocompress.recorded import Recorded, open_recorded
from autocompress.remeasure import Progress, Scorer, measure_usable, open_task, same_numbers, silent

SCHEMA = 1
NOT_AGAIN = "not measured again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is compared. `ratio` is latency over fp32's."""

    ratio: float
    ratio_ci: Interval
    latency_ms: float
    latency_ms_ci: Interval
    accuracy: float
    accuracy_ci: Interval | None

    @classmethod
    def of(cls, score: Score) -> "Figures":
        """These figures of a score."""
        return cls(**{f.name: getattr(score, f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, recorded and now; a model that does not run here has no figures now, and `failure` says why."""

    trial: int
    role: Role
    recorded: Figures
    now: Figures | None
    on_front: bool
    on_front_now: bool
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PickCheck:
    """Whether an earlier pick still meets what it was picked for; `broken` says which limits it does not."""

    trial: int
    limits: Mapping[str, float]
    holds: bool
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reprofile:
    """What a second measurement says of a front.

    Attributes:
        machine: facts that differ, as name → (recorded, now).
        fingerprint: the machine in one line.
        accuracy: where the accuracies come from.
        tau: Kendall's tau-b of the latencies recorded and now; None with fewer than two that differ.
        entered, left: trial numbers.
        pick: the last pick, None where nothing was picked.
    """

    source: str
    target: str
    target_now: str
    machine: Mapping[str, tuple[str | None, str | None]]
    fingerprint: str
    accuracy: str
    tau: float | None
    points: tuple[Point, ...]
    entered: tuple[int, ...]
    left: tuple[int, ...]
    pick: PickCheck | None


def reprofile(
    path: Path | str,
    target: str | None = None,
    on: str | None = None,
    *,
    host: Host | None = None,
    progress: Progress = silent,
) -> Reprofile:
    """Measure the front of a run, or a package, again, in fresh processes and interleaved with fp32.

    Args:
        target: another profile; default is the recorded one.
        on: where the device is: `local`, `ssh:user@host[:port]` or `adb:SERIAL`; default is as the profile says.
        host: measures in the place of that device.

    Raises:
        InputError: it is neither, a file of it was changed, or the profile takes files of another format.
        TargetError: the runtime is not usable here, or fp32 fails on it.
    """
    with open_recorded(Path(path)) as source:
        profile = _profile(source, target, on)
        if host is not None:
            return _compare(source, profile, host, progress)
        with open_host(profile.host, profile) as found:
            return _compare(source, profile, found, progress)


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b, which corrects for ties (Kendall, 1945); None where either sequence is constant."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    signs = [(_sign(one[i] - one[j]), _sign(other[i] - other[j])) for i, j in pairs]
    untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    if not all(untied):
        return None
    return sum(a * b for a, b in signs) / math.sqrt(untied[0] * untied[1])


def _profile(source: Recorded, target: str | None, on: str | None) -> Profile:
    from autocompress.config import load_profile

    profile = placed(source.profile if target is None else load_profile(target), on)
    if profile.format != source.profile.format:
        raise InputError(
            f"{source.path} holds {source.profile.format} files and {profile.name} takes {profile.format}: "
            f"search for that target with `autocompress search {source.task or 'TASK'} --target {profile.name}`"
        )
    check_runtime(profile)
    return profile


def _compare(source: Recorded, profile: Profile, host: Host, progress: Progress) -> Reprofile:
    progress(f"measuring {len(source.trials)} models in {profile.measure.processes} fresh processes")
    artifacts = {t.number: t.artifact for t in source.trials if t.artifact is not None}
    fp32 = next(t.number for t in source.trials if t.role == "fp32")
    try:
        taken, failed = measure_usable(host, artifacts[fp32], artifacts, source.inputs, profile.measure.processes)
        machine = taken[fp32].fingerprint
        again = {t.number: _timed(t, taken, source, host) for t in source.trials if t.number in taken}
        scored, accuracy_source = _scored(again, artifacts, same_numbers(source.fingerprint, machine), source, host)
    except StageError as error:
        raise TargetError(f"the models cannot be measured here: {error.stage}: {error}") from error
    before, after = (Front.of(trials, source.objectives) for trials in (source.trials, list(scored.values())))
    was, now = ({t.number for t in front.points} for front in (before, after))
    pairs = [(t.score.ratio, s.ratio) for t in source.trials if t.score and (s := _score(scored, t.number))]
    return Reprofile(
        source=str(source.path),
        target=source.profile.name,
        target_now=profile.name,
        machine=source.fingerprint.changes(machine),
        fingerprint=machine.label,
        accuracy=accuracy_source,
        tau=kendall_tau([b for b, _ in pairs], [n for _, n in pairs]),
        points=tuple(
            Point(
                trial=t.number,
                role=t.role,
                recorded=figures,
                now=Figures.of(score) if (score := _score(scored, t.number)) else None,
                on_front=t.number in was,
                on_front_now=t.number in now,
                failure=failed.get(t.number),
            )
            for t in sorted(source.trials, key=lambda t: t.score.ratio if t.score else math.inf)
            if (figures := Figures.of(t.score) if t.score else None)
        ),
        entered=tuple(sorted(now - was)),
        left=tuple(sorted(was - now)),
        pick=_check_pick(source.pick, after, scored, failed),
    )


def _timed(trial: Trial, taken: Mapping[int, Measurement], source: Recorded, host: Host) -> Trial:
    """The trial with the latency, and where it is wanted the memory, that it has here."""
    score, measurement, artifact = trial.score, taken[trial.number], trial.artifact
    assert score is not None
    assert artifact is not None
    fp32_ms = statistics.median(m.reference_ms for m in taken.values())
    low, high = measurement.ratio_ci
    limited = source.pick is not None and source.pick[1].max_memory_mb is not None
    memory = host.peak_memory(artifact, source.inputs) if limited or "memory" in source.objectives else None
    changes: dict[str, Any] = {"energy_mj": None, "peak_memory_bytes": memory}
    reasons = {**score.reasons, "energy_mj": NOT_AGAIN, "peak_memory_bytes": NOT_AGAIN}
    if memory is not None:
        del reasons["peak_memory_bytes"]
    return dataclasses.replace(
        trial,
        measurement=measurement,
        outcome=dataclasses.replace(
            score,
            ratio=measurement.ratio,
            ratio_ci=(low, high),
            latency_ms=measurement.ratio * fp32_ms,
            latency_ms_ci=(low * fp32_ms, high * fp32_ms),
            reasons=reasons,
            **changes,
        ),
    )


def _scored(
    trials: Mapping[int, Trial], artifacts: Mapping[int, Artifact], same: bool, source: Recorded, host: Host
) -> tuple[dict[int, Trial], str]:
    """The trials with the accuracy they have here, and where it comes from."""
    if same:
        return dict(trials), "reused: the files, the runtime and the processor's instructions are the same"
    try:
        task = open_task(source.task, source.task_name)
    except TaskError as error:
        return dict(trials), f"as recorded, not scored again: {error}"
    found = {}
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        fp32 = next(artifacts[t.number] for t in trials.values() if t.role == "fp32")
        scorer = Scorer(task=task, host=host, fp32=fp32, folder=Path(folder))
        for number, trial in trials.items():
            assert trial.score is not None
            accuracy, interval, reason = scorer.score(artifacts[number])
            reasons = {**trial.score.reasons, **({"accuracy_ci": reason} if reason else {})}
            score = dataclasses.replace(trial.score, accuracy=accuracy, accuracy_ci=interval, reasons=reasons)
            found[number] = dataclasses.replace(trial, outcome=score)
    return found, "scored again: the runtime or the processor's instructions are not the same"


def _check_pick(
    pick: tuple[int, Limits] | None, front: Front, trials: Mapping[int, Trial], failed: Mapping[int, str]
) -> PickCheck | None:
    """Whether the pick meets its limits here; one that was picked without limits is to be on the front."""
    if pick is None:
        return None
    number, limits = pick
    given = {f.name: v for f in dataclasses.fields(limits) if (v := getattr(limits, f.name)) is not None}
    score = _score(trials, number)
    fp32 = front.baselines["fp32"].score
    if score is None:
        broken = [f"it does not run here: {failed.get(number, 'it has no score')}"]
    elif given:
        excess = limits.violations(score, fp32)
        broken = [f"{name} = {given[name]:g} is exceeded by {v:.1%}" for name, v in excess.items() if v > 0]
    else:
        broken = [] if number in {t.number for t in front.points} else ["it is not on the front here"]
    return PickCheck(trial=number, limits=given, holds=not broken, broken=tuple(broken))


def _score(trials: Mapping[int, Trial], number: int) -> Score | None:
    return trials[number].score if number in trials else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)

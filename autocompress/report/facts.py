"""What a run says of itself beside its front: time, failures, what was left alone, what was dropped, what ran."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocompress.core.front import Front
from autocompress.core.measurement import Fingerprint
from autocompress.core.trial import RUNGS, Failure, Rung, Trial
from autocompress.report import text
from autocompress.report.document import fingerprint_of, missing_baseline, roles_of
from autocompress.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A run in figures.

    Attributes:
        seconds: spent by stage, all trials together.
        rungs: trials of candidates by rung, the lowest first, and the seconds they took.
        correlations: by pair of rungs, the rank correlation of accuracies (None where it is not known) and of how many.
        failures: number of failed trials by stage, and the first message of each.
        left_alone, dropped: names and reasons, as the log has them; None where the log does not say.
        executed: for each front point where what ran is not what was chosen, layer → what ran.
    """

    trials: int
    seconds: Mapping[str, float]
    rungs: Mapping[Rung, tuple[int, float]]
    correlations: Mapping[str, tuple[float | None, int]]
    failures: Mapping[str, tuple[int, str]]
    fingerprint: Fingerprint | None
    left_alone: Mapping[str, str] | None
    dropped: Mapping[str, str] | None
    executed: Mapping[int, Mapping[str, str]]


def facts_of(run: Run, front: Front, trials: Sequence[Trial]) -> Facts:
    """Read the facts off a run's record and log."""
    seconds: Counter[str] = Counter()
    for trial in trials:
        seconds.update(trial.seconds)
    failed = [t.outcome for t in trials if isinstance(t.outcome, Failure)]
    failures = {
        stage: (count, next(f.message for f in failed if f.stage == stage))
        for stage, count in Counter(f.stage for f in failed).most_common()
    }
    log = read_log(run)
    return Facts(
        trials=len(trials),
        seconds=dict(seconds.most_common()),
        rungs=_rungs(trials),
        correlations=_correlations(log),
        failures=failures,
        fingerprint=fingerprint_of([*front.points, *trials]),
        left_alone=_last(log, "left_alone"),
        dropped=_last(log, "dropped"),
        executed={t.number: wrong for t in front.points if (wrong := t.executed_differs)},
    )


def _rungs(trials: Sequence[Trial]) -> dict[Rung, tuple[int, float]]:
    own = [t for t in trials if t.role == "candidate"]
    found = {rung: [t for t in own if t.rung == rung] for rung in RUNGS}
    return {rung: (len(of), sum(sum(t.seconds.values()) for t in of)) for rung, of in found.items() if of}


def _correlations(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float | None, int]]:
    last = next((event for event in reversed(log) if event.get("event") == "ladder"), None)
    if last is None:
        return {}
    return {name: (last["rank_correlation"].get(name), count) for name, count in last["pairs"].items()}


def _climbed(facts: Facts) -> list[str]:
    """Of a search with recovery: what the front is of, and how far the rungs below can be believed."""
    if set(facts.rungs) <= {"oneshot"}:
        return []
    counts = ", ".join(f"{count} {rung} in {text.seconds(s)}" for rung, (count, s) in facts.rungs.items())
    if "full" in facts.rungs:
        lines = [f"The front holds fully recovered candidates only; tried: {counts}."]
    else:
        lines = [
            f"No candidate is fully recovered yet: the front is of the rung {list(facts.rungs)[-1]!r}; tried: {counts}."
        ]
    known = [f"{name} {c:.2f} ({n} pairs)" for name, (c, n) in facts.correlations.items() if c is not None]
    return [*lines, f"Rank correlation of accuracies between rungs: {', '.join(known)}."] if known else lines


def read_log(run: Run) -> list[dict[str, Any]]:
    """Events of the run's log; a last line that a killed process left unfinished is not one."""
    path = run.path / "log.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def footer(facts: Facts, front: Front, trials: Sequence[Trial]) -> list[str]:
    """The sentences under the table."""
    lines = [text.verdict(front), *_climbed(facts)]
    for role in roles_of(trials):
        if role not in front.baselines:
            lines.append(f"The baseline {role} has no figures: {missing_baseline(role, trials)}.")
    failed = sum(count for count, _ in facts.failures.values())
    if failed:
        stages = ", ".join(f"{count} in {stage}" for stage, (count, _) in facts.failures.items())
        lines.append(f"{failed} of {facts.trials} trials failed: {stages}.")
    if facts.left_alone:
        names = text.listed(sorted(facts.left_alone))
        lines.append(f"Left alone: {len(facts.left_alone)} ({names}); `autocompress report` says why.")
    if facts.seconds:
        lines.append(f"Time: {text.shares(facts.seconds)}.")
    for number, wrong in facts.executed.items():
        ran = ", ".join(f"{n} ran as {p}" for n, p in list(wrong.items())[:3])
        lines.append(f"Trial {number}: the runtime did not run {len(wrong)} layers as chosen ({ran}).")
    return lines


def _last(log: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, str] | None:
    found = [event[key] for event in log if isinstance(event.get(key), dict)]
    return found[-1] if found else None

"""The front of a run as one JSON document, schema 1: what others script against."""

from collections.abc import Sequence
from typing import Any

from autocompress.core.front import Front, judged, point_json
from autocompress.core.measurement import Fingerprint
from autocompress.core.trial import BASELINES, Failure, Trial
from autocompress.run import Run

SCHEMA = 1
ALWAYS = ("fp32", "uniform-int8")


def front_json(run: Run, front: Front, trials: Sequence[Trial]) -> dict[str, Any]:
    """`front --json`: a baseline that has no score is null, with its reason beside it."""
    machine = fingerprint_of([*front.points, *front.baselines.values(), *trials])
    baselines: dict[str, Any] = {}
    for role in roles_of(trials):
        if role in front.baselines:
            baselines[role] = point_json(front.baselines[role], front)
        else:
            baselines |= {role: None, f"{role}_reason": missing_baseline(role, trials)}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "task": run.config.task_name,
        "target": run.config.profile.name,
        "fingerprint": machine.label if machine else None,
    }
    if machine is None:
        document["fingerprint_reason"] = "nothing was measured yet"
    if (rung := next((t.rung for t in judged(trials) if t.role == "candidate"), "oneshot")) != "oneshot":
        document["rung"] = rung
    return document | {
        "objectives": list(run.config.objectives),
        "baselines": baselines,
        "points": [point_json(trial, front) for trial in front.points],
    }


def roles_of(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Baselines that a run has or should have: those of half precision only where they were tried."""
    tried = {trial.role for trial in trials}
    return tuple(role for role in BASELINES if role in ALWAYS or role in tried)


def fingerprint_of(trials: Sequence[Trial]) -> Fingerprint | None:
    """What the first measurement says of its machine; None when nothing was measured."""
    return next((t.measurement.fingerprint for t in trials if t.measurement is not None), None)


def missing_baseline(role: str, trials: Sequence[Trial]) -> str:
    """Why a baseline has no score."""
    for trial in trials:
        if trial.role == role and isinstance(trial.outcome, Failure):
            return f"trial {trial.number} failed in {trial.outcome.stage}: {trial.outcome.message}"
    return "it was not evaluated yet"

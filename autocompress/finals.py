"""Which trials are on the front, which are measured again before it is shown, and that last measuring."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autocompress.core.artifact import Artifact
from autocompress.core.errors import StageError
from autocompress.core.front import Front, nondominated, parse_objectives
from autocompress.core.measurement import Measurement
from autocompress.core.trial import Trial
from autocompress.device.hosts import Host

if TYPE_CHECKING:
    from autocompress.accuracies import Accuracies

FINAL_POINTS = 16


def points(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Non-dominated trials, fastest first: what Front.of gives, without the probabilities, which take longer."""
    axes = parse_objectives(objectives)
    scored: list[Trial] = []
    losses: list[list[float]] = []
    for trial in trials:
        figures = [None if trial.score is None else axis.value(trial.score) for axis in axes]
        known = [-v if axis.maximize else v for axis, v in zip(axes, figures, strict=True) if v is not None]
        if len(known) == len(axes) and trial.score is not None and trial.score.items is None:
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


def finalised(
    trials: Sequence[Trial],
    *,
    artifacts: Mapping[int, Artifact],
    accuracies: "Accuracies",
    host: Host,
    inputs: Path,
    processes: int,
    dropped: Callable[[int, str], None],
) -> list[Trial]:
    """These trials measured again, all in turn in so many fresh processes, with test accuracy and peak memory.

    Args:
        trials: fp32 among them.
        artifacts: by trial number, with absolute paths.
        inputs: of validation.
        dropped: told of a model that fails now, and why; it is not among what is given back.

    Raises:
        StageError: fp32 fails.
    """
    from autocompress.remeasure import measure_usable

    fp32 = next(t.number for t in trials if t.role == "fp32")
    again, failed = measure_usable(host, artifacts[fp32], artifacts, inputs, processes)
    reference_ms = statistics.median(m.reference_ms for m in again.values())
    finished = []
    for trial in (t for t in trials if t.number in again):
        try:
            measured = again[trial.number]
            finished.append(_finished(trial, artifacts[trial.number], measured, reference_ms, accuracies, host, inputs))
        except StageError as error:
            if trial.role == "fp32":
                raise
            failed[trial.number] = f"{error.stage}: {error}"
    for number, why in failed.items():
        dropped(number, why)
    return finished


def _finished(
    trial: Trial,
    artifact: Artifact,
    measurement: Measurement,
    reference_ms: float,
    accuracies: "Accuracies",
    host: Host,
    inputs: Path,
) -> Trial:
    from autocompress.meters import read_meters

    score = trial.score
    assert score is not None
    try:
        figures = read_meters(host, artifact, inputs, memory=True, energy=True)
    except StageError as error:  # it has just been measured: what cannot be read here is memory
        figures = read_meters(host, artifact, inputs, memory=False, energy=True)
        figures["reasons"]["peak_memory_bytes"] = str(error)
    tested, why = accuracies.on_test(artifact)
    again = {name: why for name, why in score.reasons.items() if name in ("accuracy", "accuracy_ci", "executed")}
    low, high = measurement.ratio_ci
    return dataclasses.replace(
        trial,
        measurement=measurement,
        latency_from=None,
        outcome=dataclasses.replace(
            score,
            latency_ms=measurement.ratio * reference_ms,
            latency_ms_ci=(low * reference_ms, high * reference_ms),
            ratio=measurement.ratio,
            ratio_ci=measurement.ratio_ci,
            peak_memory_bytes=figures["peak_memory_bytes"],
            energy_mj=figures["energy_mj"],
            test_accuracy=tested,
            reasons=again | figures["reasons"] | why,
        ),
    )


def _latency(trial: Trial) -> float:
    return trial.score.latency_ms if trial.score is not None else math.inf

"""Which trials are on the front, and which are measured again before it is shown."""

import math
from collections.abc import Sequence

import numpy as np

from autocompress.core.front import Front, nondominated, parse_objectives
from autocompress.core.trial import Trial

FINAL_POINTS = 16


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


def _latency(trial: Trial) -> float:
    return trial.score.latency_ms if trial.score is not None else math.inf

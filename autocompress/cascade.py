"""Two front members in the place of one: chosen on validation, then run and measured as they will be deployed."""

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.core.artifact import Artifact
from autocompress.core.cascade import LARGE, Cascade, CascadeRecord, Single
from autocompress.core.errors import InputError, NoPointError, StageError
from autocompress.core.front import Front, Limits
from autocompress.core.measurement import separated
from autocompress.core.trial import Score, Trial
from autocompress.device.hosts import Host, open_host
from autocompress.remeasure import Progress, Scorer, measure_again, open_task, silent
from autocompress.thresholds import Member, Option, class_scores, mixture, options

if TYPE_CHECKING:
    from autocompress.run import Run
    from autocompress.task import CheckedTask

# A sample of the measurement runs at most 100 items, and no more than take 50 ms, but not fewer than 20.
MOST_ROWS, FEWEST_ROWS, ROWS_MS = 100, 20, 50.0
OF_ONE_MODEL = "told of a model, not of two of which one runs now and then"


def find_cascade(
    run: "Run",
    limits: Limits,
    *,
    task: "CheckedTask | None" = None,
    host: Host | None = None,
    progress: Progress = silent,
) -> CascadeRecord:
    """The cascade of two front members that meets the limits and beats every single point, as it was measured.

    Where accuracy is limited it is the fastest, else the most accurate. All that is chosen is chosen on validation.

    Args:
        task: of the run; by default it is loaded as the run names it.
        host: measures in the place of the device.

    Raises:
        InputError: there are no limits, the task does not classify, or it cannot be loaded.
        NoPointError: no cascade meets the limits, or none beats a single point that does.
        TargetError: the device is not usable, or is one that runs no cascade.
    """
    if limits == Limits():
        raise InputError("a cascade is chosen by limits: give one, such as --max-accuracy-drop 0.5")
    checked = task or open_task(run.config.task, run.config.task_name)
    if host is not None:
        return _find(run, limits, checked, host, progress)
    with open_host(run.config.profile.host, run.config.profile) as found:
        return _find(run, limits, checked, found, progress)


def best(found: Iterable[Option], limits: Limits, fp32: Score, single: Trial | None) -> Option:
    """The preferred option within the limits, if it is preferred to `single`, the best single point, as well.

    Raises:
        NoPointError: there is none; names the nearest, the limit that binds, and the single point.
    """
    known = dataclasses.replace(limits, max_memory_mb=None)  # memory is known when it has run
    judged = [(option, known.violations(option.score, fp32)) for option in found]
    if not judged:
        raise NoPointError("A cascade needs two front members, one faster and one more accurate; there are no such.")
    fitting = [option for option, broken in judged if all(x <= 0 for x in broken.values())]
    if not fitting:
        nearest, broken = min(judged, key=lambda row: max(row[1].values()))
        binding = max(broken, key=lambda name: broken[name])
        instead = "" if single is None else f" Trial {single.number} alone does: --trial {single.number}."
        raise NoPointError(
            f"No cascade meets the limits; `{binding}` = {getattr(limits, binding):g} binds. "
            f"The nearest is {nearest.name}: {_figures(nearest.score)} expected.{instead}"
        )
    if _fastest(limits):
        chosen = min(fitting, key=lambda option: option.score.latency_ms)
    else:
        chosen = min(fitting, key=lambda option: (-option.score.accuracy, option.score.latency_ms))
    if single is not None and not _better(chosen.score, _scored(single), limits):
        raise NoPointError(
            f"No cascade within the limits is expected to beat trial {single.number} alone, which has "
            f"{_figures(_scored(single))}: take it with --trial {single.number}. "
            f"The best cascade is {chosen.name}, with {_figures(chosen.score)}."
        )
    return chosen


def require(record: CascadeRecord, limits: Limits, fp32: Score, single: Trial | None) -> None:
    """Raise NoPointError unless, as measured, the cascade meets the limits and beats the best single point."""
    broken = limits.violations(record.score, fp32)
    binding = max(broken, key=lambda name: broken[name])
    instead = "" if single is None else f" Trial {single.number} alone does: --trial {single.number}."
    if broken[binding] > 0:
        raise NoPointError(
            f"Measured, {record.name} has {_figures(record.score)}, which does not meet "
            f"`{binding}` = {getattr(limits, binding):g}.{instead}"
        )
    if record.single is None or single is None:
        return
    (low, high), (least, most) = record.score.ratio_ci, record.single.ratio_ci
    if _fastest(limits) and not separated(record.score.ratio_ci, record.single.ratio_ci):
        raise NoPointError(
            f"Measured in turn, {record.name} takes [{low:.3f}, {high:.3f}] of fp32's latency and trial "
            f"{single.number} alone [{least:.3f}, {most:.3f}]: it is not faster. Take --trial {single.number} instead."
        )
    if not _fastest(limits) and record.score.accuracy <= _scored(single).accuracy:
        raise NoPointError(
            f"Measured, {record.name} has {_figures(record.score)}: it is not more accurate than trial "
            f"{single.number} alone. Take --trial {single.number} instead."
        )


def mixed_rows(large: Any, share: float, latency_ms: float) -> list[int]:
    """Items for the measurement of a cascade: few enough for one sample, and the right part of them for both models."""
    return mixture(large, share, int(np.clip(ROWS_MS / latency_ms, FEWEST_ROWS, MOST_ROWS)))


def _find(run: "Run", limits: Limits, task: "CheckedTask", host: Host, progress: Progress) -> CascadeRecord:
    front = run.front()
    if (fp32 := front.baselines.get("fp32")) is None:
        raise NoPointError(f"{run.path} has no fp32 baseline: there is nothing to measure against")
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        scorer = Scorer(task=task, host=host, fp32=_file(run, fp32), folder=Path(folder))
        progress(f"running {len(front.points)} front members on validation")
        members = [_member(run, trial, scorer) for trial in front.points]
        if members:
            class_scores(members[0].outputs, task)
        single = _single(front, limits)
        option = best(options(members, task), limits, _scored(fp32), single)
        progress(f"measuring {option.name}")
        record = _measured(run, option, single, scorer, _scored(fp32))
    require(record, limits, _scored(fp32), single)
    return record


def _member(run: "Run", trial: Trial, scorer: Scorer) -> Member:
    outputs, task = scorer.outputs(_file(run, trial)), scorer.task
    hits = None if task.by_item is None else task.by_item(task.unflatten(outputs), task.targets("validation"))
    return Member(trial=trial, score=_scored(trial), outputs=outputs, hits=hits)


def _measured(run: "Run", option: Option, single: Trial | None, scorer: Scorer, fp32: Score) -> CascadeRecord:
    """The option as it runs on the device: all of validation for its accuracy, a mixture of it for its latency."""
    cascade = Cascade(small=_file(run, option.small), large=_file(run, option.large), rule=option.rule)
    outputs = scorer.outputs(cascade)
    accuracy, interval, no_interval = scorer.judge(outputs)
    share = float(outputs[LARGE].mean())
    rivals = [] if single is None else [_file(run, single)]
    measured, *others = measure_again(
        scorer.host,
        scorer.fp32,
        [cascade, *rivals],
        scorer.folder,
        run.config.profile.measure.processes,
        mixed_rows(outputs[LARGE], share, option.score.latency_ms),
    )
    memory, tested = _memory(scorer, cascade), _test_accuracy(scorer, cascade)
    reasons = {**scorer.host.reasons, "energy_mj": OF_ONE_MODEL, "executed": OF_ONE_MODEL}
    named = {"accuracy_ci": no_interval, "peak_memory_bytes": memory, "test_accuracy": tested}
    reasons |= {name: why for name, why in named.items() if isinstance(why, str)}
    reference_ms, (low, high) = fp32.latency_ms / fp32.ratio, measured.ratio_ci
    return CascadeRecord(
        small=option.small,
        large=option.large,
        rule=option.rule,
        expected_share=option.share,
        expected_accuracy=option.score.accuracy,
        expected_latency_ms=option.score.latency_ms,
        share=share,
        score=Score(
            accuracy=accuracy,
            latency_ms=measured.ratio * reference_ms,
            latency_ms_ci=(low * reference_ms, high * reference_ms),
            ratio=measured.ratio,
            ratio_ci=measured.ratio_ci,
            size_bytes=cascade.size_bytes,
            accuracy_ci=interval,
            test_accuracy=None if isinstance(tested, str) else tested,
            peak_memory_bytes=None if isinstance(memory, str) else memory,
            reasons=reasons,
        ),
        measurement=measured,
        single=Single(trial=single.number, ratio=others[0].ratio, ratio_ci=others[0].ratio_ci) if single else None,
    )


def _memory(scorer: Scorer, cascade: Cascade) -> int | str:
    try:
        return scorer.host.peak_memory(cascade, scorer.folder)
    except StageError as error:  # it has just run: what cannot be read here is memory
        return str(error)


def _test_accuracy(scorer: Scorer, cascade: Cascade) -> float | str:
    if "test" not in scorer.task.splits:
        return "the task has no test split"
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        return dataclasses.replace(scorer, split="test", folder=Path(folder)).accuracy(cascade)


def _single(front: Front, limits: Limits) -> Trial | None:
    try:
        return front.pick(limits)
    except NoPointError:
        return None


def _fastest(limits: Limits) -> bool:
    """Whether the fastest is meant, as by `Front.pick`: where accuracy is limited."""
    return limits.max_accuracy_drop is not None or limits.min_accuracy is not None


def _better(one: Score, other: Score, limits: Limits) -> bool:
    return one.latency_ms < other.latency_ms if _fastest(limits) else one.accuracy > other.accuracy


def _figures(score: Score) -> str:
    return f"accuracy {score.accuracy:.4f} and {score.latency_ms:.4g} ms"


def _scored(trial: Trial) -> Score:
    assert trial.score is not None  # a front holds no other
    return trial.score


def _file(run: "Run", trial: Trial) -> Artifact:
    """The trial's file, with an absolute path."""
    assert trial.artifact is not None
    return dataclasses.replace(trial.artifact, path=str(run.path / trial.artifact.path))

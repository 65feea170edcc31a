"""Search again where a re-profile found that ranks flipped: a few trials there, the trained weights of before."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.core.errors import InputError, RunError
from autocompress.core.trial import BASELINES
from autocompress.device.hosts import LOCAL
from autocompress.package import MANIFEST
from autocompress.reprofile import Reprofile
from autocompress.run import Run, open_run

if TYPE_CHECKING:
    from autocompress.progress import Progress


def open_researchable(path: Path | str) -> Run:
    """The run in a directory, if a search can go on from it.

    Raises:
        InputError: it is a package, which does not hold what was searched, or its task cannot be loaded by name.
        RunError: it is no run.
    """
    if (Path(path) / MANIFEST).exists():
        raise InputError(f"{path} is a package: --research needs the run it was picked from, which knows the space")
    run = open_run(path)
    if run.config.task is None:
        raise InputError(f"{path} was searched in Python with a Task, not a reference: it cannot be searched again")
    return run


def flipped(result: Reprofile) -> list[int]:
    """Trials whose place in the order of latencies, or on the front, is another one now; failed ones are not."""
    here = [p for p in result.points if p.now is not None]
    before = sorted(here, key=lambda p: p.recorded.ratio)
    now = sorted(here, key=lambda p: p.now.ratio if p.now else 0.0)
    moved = {a.trial for a, b in zip(before, now, strict=True) if a.trial != b.trial}
    moved |= set(result.entered) | set(result.left)
    baselines = {p.trial for p in result.points if p.role in BASELINES}
    return sorted(moved - baselines)


def research(
    source: Run,
    result: Reprofile,
    trials: int,
    *,
    target: str | None = None,
    on: str | None = None,
    out: Path | str | None = None,
    progress: "Progress | bool | None" = None,
) -> Run | None:
    """Spend `trials` trials on the device of a re-profile, around the models whose ranks flipped there.

    The baselines, and what is measured again of the earlier run, come on top. Weights that were trained are used again.

    Args:
        source: the run that was re-profiled.
        target, on: as they were given to the re-profile.
        out: directory of the new run; default lies beside the others.

    Returns:
        The new run; None where no rank flipped.

    Raises:
        RunError: the model is not the one of `source` any more.
    """
    from autocompress.driver import search

    if trials < 1:
        raise InputError(f"`trials` must be at least 1, got {trials}")
    around = flipped(result)
    if not around:
        return None
    config = source.config
    assert config.task is not None
    if out is None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        out = source.path.parent / f"{config.task_name}-{result.target_now}-research-{stamp}"
    if not config.model:
        raise RunError(f"{source.path} was made by a version that did not note the model: search anew")
    return search(
        config.task,
        config.profile if target is None else target,
        space=config.rules,
        trials=len(BASELINES) + len(around) + trials,
        objectives=config.objectives,
        limits=config.limits,
        fidelity=config.fidelity,
        recover_steps=config.recover_steps,
        warm_start=source,
        around=around,
        on=on or (LOCAL if target is None and config.profile.host == LOCAL else None),
        seed=config.seed + 1,
        out=out,
        progress=progress,
    )

"""What a search takes over from an earlier run of the same model: weights, teachers' answers, and where to begin.

Accuracy hardly depends on the device, and what was trained need not be trained again. Latency is measured anew, and
every file is scored in its own runtime.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from autocompress.core.errors import RunError
from autocompress.core.front import judged
from autocompress.core.space import Choice, Space, Values
from autocompress.finals import finalists
from autocompress.run import Run

FOLDERS = ("weights", "teachers")


def take_over(run: Run, earlier: Run) -> int:
    """Link, or copy, what the earlier run trained into `run`; the number of files.

    Raises:
        RunError: it was made from another model.
    """
    if not earlier.config.model or earlier.config.model != run.config.model:
        raise RunError(
            f"{earlier.path} cannot be begun with: its model {earlier.config.task_name!r} has other weights than "
            f"{run.config.task_name!r} has now"
        )
    count = 0
    for name in FOLDERS:
        for file in (earlier.path / name).glob("*"):
            target = run.path / name / file.name
            if file.suffix in (".safetensors", ".npz") and not target.exists():
                _link(file, target)
                count += 1
    return count


def beginnings(earlier: Run, space: Space, only: Collection[int] = ()) -> list[Values]:
    """Values of the earlier run's trials that are worth trying here, in this space; those numbered `only`, if given.

    They are the front with what may belong on it, and everything that was recovered: that costs no training here.
    """
    from autocompress.optimize.record import read_values

    known = read_values(earlier.storage, earlier.config.study)
    trials = [trial for trial, _ in known]
    wanted = set(only) or {t.number for t in finalists(judged(trials), earlier.config.objectives)} | {
        t.number for t in trials if t.rung != "oneshot" and t.score is not None
    }
    found = {}
    for trial, values in known:
        if trial.number in wanted and trial.role == "candidate" and values:
            here = translated(values, space)
            found[space.decode(here).digest] = here
    return list(found.values())


def translated(values: Values, space: Space) -> dict[str, Choice]:
    """Values of another space in this one: a choice that is not there becomes the nearest number, or the first one."""
    here: dict[str, Choice] = {}
    for name, choices in space.variables.items():
        value = values.get(name)
        if value in choices:
            here[name] = value
        elif isinstance(value, int | float) and all(isinstance(c, int | float) for c in choices):
            here[name] = min(choices, key=lambda c: abs(float(c) - float(value)))
        else:
            here[name] = choices[0]
    return here


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)

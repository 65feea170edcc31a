"""What was recorded of the models of a run or a package, ready to be measured again."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autocompress.core.artifact import sha256_of
from autocompress.core.cascade import Cascade
from autocompress.core.errors import PackageError, RunError
from autocompress.core.front import Limits
from autocompress.core.measurement import Fingerprint
from autocompress.core.profile import Profile
from autocompress.core.trial import Trial
from autocompress.package import MANIFEST, read_package
from autocompress.picks import read_picks
from autocompress.run import open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The models worth measuring again, fp32 among them; their files are the ones that were scored.

    Attributes:
        trials: artifacts have absolute paths.
        inputs: a folder with `<input name>.npy`.
        pick: trial number and limits of the last pick.
    """

    path: Path
    task: str | None
    task_name: str
    profile: Profile
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    fingerprint: Fingerprint
    inputs: Path
    pick: tuple[int, Limits] | None


@contextlib.contextmanager
def open_recorded(path: Path) -> Iterator[Recorded]:
    """A run or a package, whichever is in the directory.

    Raises:
        InputError: it is neither, or a file is missing or was changed.
    """
    folder = path.resolve()
    with _open_package(folder) if (folder / MANIFEST).exists() else _open_run(folder) as found:
        yield found


@contextlib.contextmanager
def _open_run(folder: Path) -> Iterator[Recorded]:
    from autocompress.finals import finalists

    run = open_run(folder)
    trials = run.final() or run.trials()
    last = [pick for pick in read_picks(run) if pick.small is None][-1:]  # a cascade is checked by `verify`
    numbers = {t.number for t in finalists(trials, run.config.objectives)} | {pick.trial for pick in last}
    again = [_checked(t, run.path) for t in trials if t.number in numbers and t.score is not None]
    if not any(t.role == "fp32" for t in again):
        raise RunError(f"{run.path} has no fp32 baseline yet: there is nothing to measure against")
    machine = next((t.measurement.fingerprint for t in again if t.measurement), Fingerprint(facts={}))
    yield Recorded(
        path=run.path,
        task=run.config.task,
        task_name=run.config.task_name,
        profile=run.config.profile,
        objectives=run.config.objectives,
        trials=tuple(again),
        fingerprint=machine,
        inputs=run.data / "validation",
        pick=(last[0].trial, last[0].limits) if last else None,
    )


@contextlib.contextmanager
def _open_package(folder: Path) -> Iterator[Recorded]:
    package = read_package(folder)
    manifest, model = package.manifest, package.model
    if isinstance(model, Cascade):
        raise PackageError(
            f"{folder} holds a cascade of two models: `autocompress verify` measures it where it stands, "
            "and `autocompress reprofile` of the run it was picked from measures the front again"
        )
    trials = [dataclasses.replace(manifest.baseline, artifact=package.baseline)]
    if manifest.trial.number != manifest.baseline.number:
        trials.append(dataclasses.replace(manifest.trial, artifact=model))
    with package.inputs() as inputs:
        yield Recorded(
            path=folder,
            task=manifest.task,
            task_name=manifest.task_name,
            profile=manifest.profile,
            objectives=("accuracy", "latency"),
            trials=tuple(trials),
            fingerprint=manifest.fingerprint,
            inputs=inputs,
            pick=(manifest.trial.number, manifest.limits),
        )


def _checked(trial: Trial, folder: Path) -> Trial:
    """The trial with an absolute path to its file, which is the one that was scored."""
    assert trial.artifact is not None
    path = folder / trial.artifact.path
    if not path.is_file():
        raise RunError(f"the model of trial {trial.number} is missing: {path}")
    if sha256_of(path) != trial.artifact.sha256:
        raise RunError(f"{path} is not the file that was scored as trial {trial.number}: its SHA-256 differs")
    return dataclasses.replace(trial, artifact=dataclasses.replace(trial.artifact, path=str(path)))

"""A deployment package: a directory with everything that running, checking and rolling back a picked model needs.

::

    package/manifest.json       what was picked, its figures with raw samples, and the SHA-256 of every other file
    package/model.onnx          the picked model
    package/fp32.onnx           the baseline: what latency is measured against, and what to roll back to
    package/predict.py          runs the model with numpy and the runtime only
    package/sample-inputs.npz   items of the validation split, at most SAMPLE_ITEMS and SAMPLE_BYTES
    package/sample-outputs.npz  what the picked model gave for them when it was packed
    package/README.md           the same for people

The validation data is the task's, not the package's: where the task loads, a package is scored again on all of it;
everywhere else its outputs on the sample are compared.
"""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.errors import InputError, PackageError
from autocompress.core.front import MB, Limits
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.core.record import dump, load
from autocompress.core.trial import Trial
from autocompress.picks import note_pick
from autocompress.run import Run, library_versions, utc_now, write_json

SCHEMA = 1
SAMPLE_ITEMS = 256
SAMPLE_BYTES = 20_000_000
MANIFEST = "manifest.json"
INPUTS, OUTPUTS = "sample-inputs.npz", "sample-outputs.npz"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A file of a package, as it was written."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        task: reference to the task, None when it was handed over in Python.
        limits: what the pick had to meet.
        trial, baseline: the picked model and fp32; their artifacts' paths are relative to the package.
        measurement: raw samples behind the latency, None for fp32 itself.
        sample_items: items in the sample.
        files: every file but the manifest, by path in the package.
    """

    created: str
    task: str | None
    task_name: str
    profile: Profile
    limits: Limits
    trial: Trial
    baseline: Trial
    measurement: Measurement | None
    fingerprint: Fingerprint
    versions: Mapping[str, str]
    sample_items: int
    files: Mapping[str, PackedFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package whose files are all there and unchanged. `path` is absolute."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Artifact:
        """The picked model, with an absolute path."""
        return self._artifact(self.manifest.trial)

    @property
    def baseline(self) -> Artifact:
        """The fp32 model, with an absolute path."""
        return self._artifact(self.manifest.baseline)

    def sample_outputs(self) -> Arrays:
        """What the picked model gave for the sample."""
        return _read_npz(self.path / OUTPUTS)

    @contextmanager
    def inputs(self) -> Iterator[Path]:
        """A folder with the sample's inputs as `<name>.npy`, for the device."""
        with TemporaryDirectory(prefix="autocompress-") as folder:
            for name, array in _read_npz(self.path / INPUTS).items():
                np.save(Path(folder) / f"{name}.npy", array, allow_pickle=False)
            yield Path(folder)

    def _artifact(self, trial: Trial) -> Artifact:
        assert trial.artifact is not None
        return dataclasses.replace(trial.artifact, path=str(self.path / trial.artifact.path))


def write_package(run: Run, trial: Trial, out: Path | str, *, limits: Limits | None = None) -> Path:
    """Write a package of `trial`, whole or not at all, and note the pick in the run; returns its absolute path.

    Raises:
        PackageError: `out` is not empty, the trial has no model, or its file is not what was scored.
    """
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PackageError(f"{out} is there already: a package needs a directory of its own, name another")
    baseline = run.front().baselines.get("fp32")
    if baseline is None:
        raise PackageError(f"{run.path} has no fp32 baseline: there is nothing to roll back to")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, run, trial, baseline, limits or Limits())
        temporary.rename(target)
    except OSError as error:
        raise PackageError(f"cannot write a package at {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note_pick(run, trial.number, limits or Limits(), target)
    return target


def read_package(path: Path | str) -> Package:
    """The package in a directory, every file compared with its SHA-256.

    Raises:
        PackageError: it is no package, or a file is missing or was changed; names the file.
    """
    folder = Path(path).resolve()
    try:
        manifest = load(Manifest, json.loads((folder / MANIFEST).read_text(encoding="utf-8")), SCHEMA)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such directory"
        raise PackageError(f"{path} is no package: {reason}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is no package: its {MANIFEST} is not JSON ({error})") from error
    except InputError as error:
        raise PackageError(f"{path}: {error}") from error
    for name, packed in manifest.files.items():
        _check_file(folder, name, packed)
    for name in (_model_path(manifest.trial), _model_path(manifest.baseline), INPUTS, OUTPUTS):
        if name not in manifest.files:
            raise PackageError(f"{path}: {MANIFEST} has no SHA-256 of {name!r}, which it needs")
    for artifact in (manifest.trial.artifact, manifest.baseline.artifact):
        if artifact is not None and artifact.sha256 != manifest.files[artifact.path].sha256:
            raise PackageError(f"{path}: {MANIFEST} has figures for another file than {artifact.path!r}")
    return Package(path=folder, manifest=manifest)


def _fill(folder: Path, run: Run, trial: Trial, baseline: Trial, limits: Limits) -> None:
    packed = {
        name: dataclasses.replace(t, artifact=_copy(run, t, folder, name), measurement=None)
        for name, t in (("model.onnx", trial), ("fp32.onnx", baseline))
    }
    items = _write_sample(folder, run, packed["model.onnx"])
    shutil.copyfile(Path(__file__).with_name("predict.py"), folder / "predict.py")
    measurement = _samples(run, trial)
    fingerprint = measurement.fingerprint if measurement else _any_fingerprint(run)
    (folder / "README.md").write_text(_readme(run, trial, items), encoding="utf-8")
    manifest = Manifest(
        created=utc_now(),
        task=run.config.task,
        task_name=run.config.task_name,
        profile=run.config.profile,
        limits=limits,
        trial=packed["model.onnx"],
        baseline=packed["fp32.onnx"],
        measurement=measurement,
        fingerprint=fingerprint,
        versions=library_versions(),
        sample_items=items,
        files={p.name: PackedFile(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in sorted(folder.iterdir())},
    )
    write_json(folder / MANIFEST, dump(manifest, SCHEMA))


def _copy(run: Run, trial: Trial, folder: Path, name: str) -> Artifact:
    if trial.artifact is None or trial.score is None:
        raise PackageError(f"trial {trial.number} has no scored model to pack")
    source = run.path / trial.artifact.path
    if not source.is_file():
        raise PackageError(f"the model of trial {trial.number} is missing: {source}")
    shutil.copyfile(source, folder / name)
    if sha256_of(folder / name) != trial.artifact.sha256:
        raise PackageError(f"{source} is not the file that was scored as trial {trial.number}: its SHA-256 differs")
    return dataclasses.replace(trial.artifact, path=name)


def _write_sample(folder: Path, run: Run, model: Trial) -> int:
    """Write sample inputs, evenly spread over validation, and the model's outputs for them; returns their number."""
    from autocompress.device.hosts import open_host

    assert model.artifact is not None
    sources = {s.name: _open_array(run.data / "validation" / f"{s.name}.npy") for s in model.artifact.inputs}
    count = min(len(a) for a in sources.values())
    item_bytes = max(1, sum(a.nbytes // len(a) for a in sources.values()))
    keep = np.unique(np.linspace(0, count - 1, max(1, min(count, SAMPLE_ITEMS, SAMPLE_BYTES // item_bytes)), dtype=int))
    inputs = {name: np.ascontiguousarray(array[keep]) for name, array in sources.items()}
    absolute = dataclasses.replace(model.artifact, path=str(folder / model.artifact.path))
    with (
        TemporaryDirectory(prefix="autocompress-") as scratch,
        open_host(run.config.profile.host, run.config.profile) as host,
    ):
        given, got = Path(scratch, "in"), Path(scratch, "out")
        given.mkdir()
        got.mkdir()
        for name, array in inputs.items():
            np.save(given / f"{name}.npy", array, allow_pickle=False)
        host.outputs(absolute, given, got)
        outputs = {spec.name: np.load(got / f"{spec.name}.npy", allow_pickle=False) for spec in absolute.outputs}
    for name, arrays in ((INPUTS, inputs), (OUTPUTS, outputs)):
        np.savez_compressed(folder / name, allow_pickle=False, **arrays)
    return len(keep)


def _open_array(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise PackageError(f"the run's validation data is missing: {path}") from error
    except ValueError as error:
        raise PackageError(f"{path} is no array: {error}") from error


def _read_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{path} cannot be read: {error}") from error
    for name in arrays:
        if PurePosixPath(name).name != name or "\\" in name:  # names become files
            raise PackageError(f"{path}: {name!r} cannot be the name of an input or output")
    return arrays


def _samples(run: Run, trial: Trial) -> Measurement | None:
    """The raw timing behind a trial's latency: its own, or that of the trial with equal kernels."""
    if trial.measurement is not None or trial.latency_from is None:
        return trial.measurement
    known = (t.measurement for t in run.trials() if t.measurement is not None)
    return next((m for m in known if m.artifact_sha256 == trial.latency_from), None)


def _any_fingerprint(run: Run) -> Fingerprint:
    known = (t.measurement.fingerprint for t in (*(run.final() or ()), *run.trials()) if t.measurement is not None)
    return next(known, Fingerprint(facts={}))


def _check_file(folder: Path, name: str, packed: PackedFile) -> None:
    """Refuse a path that leaves the package, then a file that is not what was written."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise PackageError(f"{folder / MANIFEST} names {name!r}, which is not a path inside the package")
    path = folder.joinpath(*parts)
    if any(p.is_symlink() for p in (path, *path.parents) if p.is_relative_to(folder) and p != folder):
        raise PackageError(f"{path} is a symbolic link: a package holds its own files only")
    if not path.is_file():
        raise PackageError(f"the package is incomplete: {path} is missing")
    if path.stat().st_size != packed.size_bytes or sha256_of(path) != packed.sha256:
        raise PackageError(f"{path} was changed: its SHA-256 is not the one in {MANIFEST}")


def _model_path(trial: Trial) -> str:
    if trial.artifact is None or trial.score is None:
        raise PackageError(f"{MANIFEST}: trial {trial.number} has no scored model")
    return trial.artifact.path


def _readme(run: Run, trial: Trial, items: int) -> str:
    assert trial.score is not None
    assert trial.artifact is not None
    score = trial.score
    inputs = "\n".join(f"- input `{s.name}`: {s.dtype} {_shape(s.shape)}" for s in trial.artifact.inputs)
    outputs = "\n".join(f"- output `{s.name}`: {s.dtype} {_shape(s.shape)}" for s in trial.artifact.outputs)
    return f"""# {run.config.task_name} for {run.config.profile.name}

Trial {trial.number}: accuracy {score.accuracy:.4f} on validation, {score.latency_ms:.4g} ms an item,
{1 / score.ratio:.2f} times the speed of the original, {score.size_bytes / MB:.4g} MB.

{inputs}
{outputs}

Run it (numpy and {run.config.profile.runtime} are all it needs): `python predict.py {INPUTS}`

Check it where it stands: `autocompress verify .`; on new hardware: `autocompress reprofile .`

Roll back: `fp32.onnx` is the original model with the same inputs and outputs.

`{INPUTS}` has {items} items of the validation split, `{OUTPUTS}` what the model gave for them,
`{MANIFEST}` all figures with their raw samples and the SHA-256 of every file.
"""


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if n is None else str(n) for n in shape) + ")"

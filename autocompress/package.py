"""A deployment package: a directory with everything that running, checking and rolling back a picked model needs.

::

    package/manifest.json       what was picked, its figures with raw samples, and the SHA-256 of every other file
    package/model.onnx          the picked model; .tflite for LiteRT
    package/small.onnx, package/large.onnx, package/predict_cascade.py
                                in its place where a cascade was picked: two models, and what decides between them
    package/fp32.onnx           the baseline: what latency is measured against, and what to roll back to
    package/predict.py          runs the model with numpy and the runtime only, through
    package/predict_….py        the one for this runtime; neither for a runtime of one's own
    package/sample-inputs.npz   items of the validation split, at most 256 and 20 MB
    package/sample-outputs.npz  what the picked model gave for them when it was packed
    package/README.md           the same for people

The validation data is the task's, not the package's: where the task loads, a package is scored again on all of it;
everywhere else its outputs on the sample are compared.
"""

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.cascade import Cascade, CascadeRecord, Runnable
from autocompress.core.errors import InputError, PackageError
from autocompress.core.front import Limits
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.core.record import RARE, load
from autocompress.core.trial import Score, Trial

SCHEMA = 1
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
        trial, baseline: the picked model and fp32; their artifacts' paths are relative to the package. Of a cascade
            it is the large model.
        measurement: raw samples behind the latency, None for fp32 itself.
        cascade: what was picked where that is a cascade, its members' paths relative to the package.
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
    cascade: CascadeRecord | None = field(default=None, metadata=RARE)

    @property
    def picked(self) -> tuple[Trial, ...]:
        """The picked model, or both of a cascade."""
        return (self.trial,) if self.cascade is None else (self.cascade.small, self.cascade.large)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package whose files are all there and unchanged. `path` is absolute."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Runnable:
        """The picked model, with an absolute path, or the cascade of two."""
        found = [self._artifact(trial) for trial in self.manifest.picked]
        if self.manifest.cascade is None:
            return found[0]
        return Cascade(small=found[0], large=found[1], rule=self.manifest.cascade.rule)

    @property
    def score(self) -> Score:
        """What was measured of it."""
        score = self.manifest.trial.score if self.manifest.cascade is None else self.manifest.cascade.score
        assert score is not None  # `read_package` refuses one without
        return score

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
    trials = (manifest.trial, manifest.baseline, *manifest.picked)
    for name in (*map(_model_path, trials), INPUTS, OUTPUTS):
        if name not in manifest.files:
            raise PackageError(f"{path}: {MANIFEST} has no SHA-256 of {name!r}, which it needs")
    for artifact in (trial.artifact for trial in trials):
        if artifact is not None and artifact.sha256 != manifest.files[artifact.path].sha256:
            raise PackageError(f"{path}: {MANIFEST} has figures for another file than {artifact.path!r}")
    return Package(path=folder, manifest=manifest)


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

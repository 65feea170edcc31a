"""Write a deployment package of a picked model; `package.py` says what is in one."""

import dataclasses
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.artifact import Artifact, TensorSpec, sha256_of
from autocompress.core.errors import PackageError
from autocompress.core.front import MB, Limits
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.record import dump
from autocompress.core.trial import Trial
from autocompress.package import INPUTS, MANIFEST, OUTPUTS, SCHEMA, Manifest, PackedFile
from autocompress.picks import note_pick
from autocompress.run import Run, library_versions, utc_now, write_json

SAMPLE_ITEMS = 256
SAMPLE_BYTES = 20_000_000
PREDICTORS = ("onnxruntime", "openvino", "litert", "tensorrt")


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


def _fill(folder: Path, run: Run, trial: Trial, baseline: Trial, limits: Limits) -> None:
    model, fp32 = (
        dataclasses.replace(t, artifact=_copy(run, t, folder, name), measurement=None)
        for name, t in (("model", trial), ("fp32", baseline))
    )
    items = _write_sample(folder, run, model)
    runs = _write_predictor(folder, run.config.profile.runtime)
    measurement = _samples(run, trial)
    fingerprint = measurement.fingerprint if measurement else _any_fingerprint(run)
    (folder / "README.md").write_text(_readme(run, model, fp32, items, runs), encoding="utf-8")
    manifest = Manifest(
        created=utc_now(),
        task=run.config.task,
        task_name=run.config.task_name,
        profile=run.config.profile,
        limits=limits,
        trial=model,
        baseline=fp32,
        measurement=measurement,
        fingerprint=fingerprint,
        versions=library_versions(),
        sample_items=items,
        files={p.name: PackedFile(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in sorted(folder.iterdir())},
    )
    write_json(folder / MANIFEST, dump(manifest, SCHEMA))


def _write_predictor(folder: Path, runtime: str) -> bool:
    """Copy what runs the model there; whether there is such a thing for this runtime."""
    if runtime not in PREDICTORS:
        return False
    for name in ("predict.py", f"predict_{runtime}.py"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    return True


def _copy(run: Run, trial: Trial, folder: Path, name: str) -> Artifact:
    if trial.artifact is None or trial.score is None:
        raise PackageError(f"trial {trial.number} has no scored model to pack")
    source = run.path / trial.artifact.path
    if not source.is_file():
        raise PackageError(f"the model of trial {trial.number} is missing: {source}")
    name += source.suffix
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


def _samples(run: Run, trial: Trial) -> Measurement | None:
    """The raw timing behind a trial's latency: its own, or that of the trial with equal kernels."""
    if trial.measurement is not None or trial.latency_from is None:
        return trial.measurement
    known = (t.measurement for t in run.trials() if t.measurement is not None)
    return next((m for m in known if m.artifact_sha256 == trial.latency_from), None)


def _any_fingerprint(run: Run) -> Fingerprint:
    known = (t.measurement.fingerprint for t in (*(run.final() or ()), *run.trials()) if t.measurement is not None)
    return next(known, Fingerprint(facts={}))


def _readme(run: Run, trial: Trial, baseline: Trial, items: int, runs: bool) -> str:
    assert trial.score is not None
    assert trial.artifact is not None
    assert baseline.artifact is not None
    score, artifact, profile = trial.score, trial.artifact, run.config.profile
    lines = [f"- {kind} `{s.name}`: {s.dtype} {_shape(s.shape)}" for kind, s in _ports(artifact)]
    options = {**profile.options, **artifact.options}
    lines += [f"- option `{name}` of {profile.runtime}: {value}" for name, value in options.items()]
    how = f"numpy and {profile.runtime} are all it needs): `python predict.py {INPUTS}`"
    ports = "\n".join(lines)
    return f"""# {run.config.task_name} for {profile.name}

Trial {trial.number}: accuracy {score.accuracy:.4f} on validation, {score.latency_ms:.4g} ms an item,
{1 / score.ratio:.2f} times the speed of the original, {score.size_bytes / MB:.4g} MB.

{ports}

{f"Run it ({how}" if runs else f"Run `{artifact.path}` with {profile.runtime}."}

Check it where it stands: `autocompress verify .`; on new hardware: `autocompress reprofile .`

Roll back: `{baseline.artifact.path}` is the original model with the same inputs and outputs.

`{INPUTS}` has {items} items of the validation split, `{OUTPUTS}` what the model gave for them,
`{MANIFEST}` all figures with their raw samples and the SHA-256 of every file.
"""


def _ports(artifact: Artifact) -> list[tuple[str, TensorSpec]]:
    return [("input", spec) for spec in artifact.inputs] + [("output", spec) for spec in artifact.outputs]


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if n is None else str(n) for n in shape) + ")"

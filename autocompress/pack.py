"""Write a deployment package of a picked model; `package.py` says what is in one."""

import dataclasses
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import confidence
from autocompress.core.artifact import Artifact, TensorSpec, sha256_of
from autocompress.core.cascade import Cascade, CascadeRecord, Runnable
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


def write_package(run: Run, picked: Trial | CascadeRecord, out: Path | str, *, limits: Limits | None = None) -> Path:
    """Write a package of what was picked, whole or not at all, and note it in the run; returns its absolute path.

    Raises:
        PackageError: `out` is not empty, a trial has no model, or its file is not what was scored.
    """
    target = Path(out).resolve()
    refuse_taken(out)
    baseline = run.front().baselines.get("fp32")
    if baseline is None:
        raise PackageError(f"{run.path} has no fp32 baseline: there is nothing to roll back to")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, run, picked, baseline, limits or Limits())
        temporary.rename(target)
    except OSError as error:
        raise PackageError(f"cannot write a package at {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(picked, CascadeRecord):
        note_pick(run, picked.large.number, limits or Limits(), target, small=picked.small.number)
    else:
        note_pick(run, picked.number, limits or Limits(), target)
    return target


def refuse_taken(out: Path | str) -> None:
    """Raise PackageError where a package cannot be written because something is there."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PackageError(f"{out} is there already: a package needs a directory of its own, name another")


def _fill(folder: Path, run: Run, picked: Trial | CascadeRecord, baseline: Trial, limits: Limits) -> None:
    cascade = None
    if isinstance(picked, CascadeRecord):
        small, model = (_packed(folder, run, t, name) for name, t in (("small", picked.small), ("large", picked.large)))
        cascade, measurement = dataclasses.replace(picked, small=small, large=model), _samples(run, picked.large)
        fingerprint = picked.measurement.fingerprint
        runnable: Runnable = Cascade(small=_file(folder, small), large=_file(folder, model), rule=picked.rule)
    else:
        model, measurement = _packed(folder, run, picked, "model"), _samples(run, picked)
        fingerprint = measurement.fingerprint if measurement else _any_fingerprint(run)
        runnable = _file(folder, model)
    fp32 = _packed(folder, run, baseline, "fp32")
    items = _write_sample(folder, run, runnable)
    runs = _write_predictor(folder, run.config.profile.runtime, with_cascade=cascade is not None)
    (folder / "README.md").write_text(_readme(run, cascade or model, fp32, items, runs), encoding="utf-8")
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
        cascade=cascade,
        files={p.name: PackedFile(sha256=sha256_of(p), size_bytes=p.stat().st_size) for p in sorted(folder.iterdir())},
    )
    write_json(folder / MANIFEST, dump(manifest, SCHEMA))


def _write_predictor(folder: Path, runtime: str, *, with_cascade: bool) -> bool:
    """Copy what runs the model there; whether there is such a thing for this runtime."""
    if runtime not in PREDICTORS:
        return False
    for name in ("predict.py", f"predict_{runtime}.py"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    if with_cascade:
        shutil.copyfile(Path(confidence.__file__), folder / "predict_cascade.py")
    return True


def _packed(folder: Path, run: Run, trial: Trial, name: str) -> Trial:
    """The trial with its file copied into the package, without raw samples."""
    return dataclasses.replace(trial, artifact=_copy(folder, run, trial, name), measurement=None)


def _file(folder: Path, trial: Trial) -> Artifact:
    """The trial's file, with an absolute path."""
    assert trial.artifact is not None
    return dataclasses.replace(trial.artifact, path=str(folder / trial.artifact.path))


def _copy(folder: Path, run: Run, trial: Trial, name: str) -> Artifact:
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


def _write_sample(folder: Path, run: Run, model: Runnable) -> int:
    """Write sample inputs, evenly spread over validation, and the model's outputs for them; returns their number."""
    from autocompress.device.hosts import open_host

    sources = {s.name: _open_array(run.data / "validation" / f"{s.name}.npy") for s in model.inputs}
    count = min(len(a) for a in sources.values())
    item_bytes = max(1, sum(a.nbytes // len(a) for a in sources.values()))
    keep = np.unique(np.linspace(0, count - 1, max(1, min(count, SAMPLE_ITEMS, SAMPLE_BYTES // item_bytes)), dtype=int))
    inputs = {name: np.ascontiguousarray(array[keep]) for name, array in sources.items()}
    with (
        TemporaryDirectory(prefix="autocompress-") as scratch,
        open_host(run.config.profile.host, run.config.profile) as host,
    ):
        given, got = Path(scratch, "in"), Path(scratch, "out")
        given.mkdir()
        got.mkdir()
        for name, array in inputs.items():
            np.save(given / f"{name}.npy", array, allow_pickle=False)
        host.outputs(model, given, got)
        outputs = {spec.name: np.load(got / f"{spec.name}.npy", allow_pickle=False) for spec in model.outputs}
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


def _readme(run: Run, picked: Trial | CascadeRecord, baseline: Trial, items: int, runs: bool) -> str:
    trial = picked.large if isinstance(picked, CascadeRecord) else picked
    assert trial.artifact is not None
    assert picked.score is not None
    assert baseline.artifact is not None
    score, artifact, profile = picked.score, trial.artifact, run.config.profile
    lines = [f"- {kind} `{s.name}`: {s.dtype} {_shape(s.shape)}" for kind, s in _ports(artifact)]
    options = {**profile.options, **artifact.options}
    lines += [f"- option `{name}` of {profile.runtime}: {value}" for name, value in options.items()]
    what, file, where = f"Trial {trial.number}", f"`{artifact.path}`", "; on new hardware: `autocompress reprofile .`"
    if isinstance(picked, CascadeRecord):
        what, where = picked.name.capitalize(), ""
        file = _two_files(picked)
    how = f"numpy and {profile.runtime} are all it needs): `python predict.py {INPUTS}`"
    ports = "\n".join(lines)
    return f"""# {run.config.task_name} for {profile.name}

{what}: accuracy {score.accuracy:.4f} on validation, {score.latency_ms:.4g} ms an item,
{1 / score.ratio:.2f} times the speed of the original, {score.size_bytes / MB:.4g} MB.

{ports}

{f"Run it ({how}" if runs else f"Run {file} with {profile.runtime}."}

Check it where it stands: `autocompress verify .`{where}

Roll back: `{baseline.artifact.path}` is the original model with the same inputs and outputs.

`{INPUTS}` has {items} items of the validation split, `{OUTPUTS}` what the model gave for them,
`{MANIFEST}` all figures with their raw samples and the SHA-256 of every file.
"""


def _two_files(cascade: CascadeRecord) -> str:
    assert cascade.small.artifact is not None
    assert cascade.large.artifact is not None
    rule = cascade.rule
    return (
        f"`{cascade.small.artifact.path}`, and `{cascade.large.artifact.path}` for the items where the {rule.kind} "
        f"of its `{rule.output}` is below {rule.threshold:.6g} ({cascade.share:.1%} of validation),"
    )


def _ports(artifact: Artifact) -> list[tuple[str, TensorSpec]]:
    return [("input", spec) for spec in artifact.inputs] + [("output", spec) for spec in artifact.outputs]


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if n is None else str(n) for n in shape) + ")"

"""A package is whole, runs without us, and notices every change."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.artifact import sha256_of
from autocompress.core.errors import PackageError, VerifyError
from autocompress.core.front import Limits
from autocompress.device.onnxruntime import OnnxRuntime
from autocompress.pack import write_package
from autocompress.package import INPUTS, MANIFEST, OUTPUTS, read_package
from autocompress.picks import read_picks
from autocompress.run import Run, open_run
from autocompress.verify import verify_package
from tests import made

# Nothing but numpy and the runtime (and what those two import) may be importable.
ISOLATED = """
import runpy, sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("autocompress", "torch", "onnx", "pydantic", "yaml", "psutil", "rich", "optuna"):
            raise ModuleNotFoundError(f"no {name} here")
sys.meta_path.insert(0, Only())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


PREDICT = ("predict.py", "predict_onnxruntime.py")
LIMITS = Limits(max_accuracy_drop=5.0)


@pytest.fixture(scope="module")
def _package(_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    run = open_run(shutil.copytree(_digits, folder / "run"))
    return write_package(run, run.front().pick(LIMITS), folder / "package", limits=LIMITS)


@pytest.fixture
def package(_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_package, tmp_path / "package"))


def tamper(package: Path, **changes: object) -> None:
    """Change keys of the manifest."""
    path = package / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def replace_file(package: Path, name: str, source: Path) -> None:
    """Put another file in the place of one, as somebody who also corrects the manifest would."""
    shutil.copyfile(source, package / name)
    files = json.loads((package / MANIFEST).read_text())["files"]
    files[name] = {"sha256": sha256_of(source), "size_bytes": source.stat().st_size}
    trial = json.loads((package / MANIFEST).read_text())["trial"]
    if name == "model.onnx":
        trial["artifact"] |= files[name]
    tamper(package, files=files, trial=trial)


def test_what_was_written_is_read_back(package: Path, digits_run: Run) -> None:
    found = read_package(package)
    picked = digits_run.front().pick(LIMITS)
    assert found.manifest.trial.outcome == picked.outcome
    assert found.manifest.trial.candidate == picked.candidate
    assert found.manifest.measurement == picked.measurement
    assert found.manifest.limits == LIMITS
    assert found.manifest.fingerprint.facts["runtime"].startswith("onnxruntime ")
    assert picked.artifact is not None
    assert sha256_of(Path(found.model.path)) == picked.artifact.sha256
    assert sha256_of(Path(found.baseline.path)) != picked.artifact.sha256


def test_every_file_but_the_manifest_has_its_hash(package: Path) -> None:
    files = read_package(package).manifest.files
    assert {p.name for p in package.iterdir()} == {*files, MANIFEST}
    assert {"model.onnx", "fp32.onnx", *PREDICT, "README.md", INPUTS, OUTPUTS} == set(files)


def test_a_pick_is_noted_in_the_run(digits_run: Run, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_package(digits_run, digits_run.front().points[0], tmp_path / name, limits=LIMITS)
    assert [Path(pick.package).name for pick in read_picks(digits_run)] == ["first", "second"]
    assert read_picks(digits_run)[-1].limits == LIMITS


def predicts(package: Path, out: Path, isolated: str = ISOLATED) -> None:
    """Check that `predict.py` alone gives the outputs that were packed."""
    command = [sys.executable, "-c", isolated, str(package / "predict.py"), str(package / INPUTS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as got, np.load(package / OUTPUTS) as expected:
        assert set(got) == set(expected)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_predict_runs_with_numpy_and_the_runtime_only(package: Path, tmp_path: Path) -> None:
    predicts(package, tmp_path / "out.npz")


def test_a_package_for_openvino_predicts_with_openvino_only(digits_run: Run, tmp_path: Path) -> None:
    """The files are the same; what runs them, and with which options, is the profile's."""
    config = json.loads((digits_run.path / "run.json").read_text())
    config["profile"] |= {"runtime": "openvino", "name": "cpu-openvino"}
    (digits_run.path / "run.json").write_text(json.dumps(config))
    run = open_run(digits_run.path)
    package = write_package(run, run.front().pick(LIMITS), tmp_path / "package", limits=LIMITS)
    assert {p.name for p in package.glob("*.py")} == {"predict.py", "predict_openvino.py"}
    predicts(package, tmp_path / "out.npz", ISOLATED.replace('"torch"', '"torch", "onnxruntime"'))


def test_a_runtime_of_ones_own_has_no_predictor(digits_run: Run, tmp_path: Path) -> None:
    config = json.loads((digits_run.path / "run.json").read_text())
    config["profile"] |= {"runtime": "tests.test_package:Own"}
    (digits_run.path / "run.json").write_text(json.dumps(config))
    run = open_run(digits_run.path)
    package = write_package(run, run.front().points[0], tmp_path / "package")
    assert not list(package.glob("*.py"))
    assert "Run `model.onnx` with tests.test_package:Own." in (package / "README.md").read_text()
    read_package(package)


class Own(OnnxRuntime):
    """A runtime that is not in the table."""


def test_options_of_the_picked_file_stay_with_it(digits_run: Run, tmp_path: Path) -> None:
    """They decide what is run, as much as its bytes do."""
    point = digits_run.front().points[0]
    assert point.artifact is not None
    own = dataclasses.replace(point, artifact=dataclasses.replace(point.artifact, options={"optimization": "none"}))
    package = write_package(digits_run, own, tmp_path / "package")
    assert read_package(package).model.options == {"optimization": "none"}
    assert "- option `optimization` of onnxruntime: none" in (package / "README.md").read_text()
    predicts(package, tmp_path / "out.npz")


def test_predict_names_what_is_missing(package: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", picture=np.zeros((1, 1, 8, 8), np.float32))
    command = [sys.executable, str(package / "predict.py"), str(tmp_path / "wrong.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the model's inputs are image, got picture\n"


@pytest.mark.parametrize("name", ["model.onnx", "fp32.onnx", *PREDICT, "README.md", INPUTS, OUTPUTS])
def test_a_changed_file_is_named(package: Path, name: str) -> None:
    path = package / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=rf"{name} was changed: its SHA-256 is not the one in manifest\.json"):
        read_package(package)


def test_a_truncated_model_is_named(package: Path) -> None:
    with (package / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PackageError, match=r"model\.onnx was changed"):
        verify_package(package)


def test_a_missing_file_is_named(package: Path) -> None:
    (package / "fp32.onnx").unlink()
    with pytest.raises(PackageError, match=r"the package is incomplete: .*fp32\.onnx is missing"):
        read_package(package)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\\..\\b", ""])
def test_a_path_that_leaves_the_package_is_refused(package: Path, name: str) -> None:
    (package.parent / "secret").write_text("x")
    tamper(package, files={name: {"sha256": "0" * 64, "size_bytes": 1}})
    with pytest.raises(PackageError, match="which is not a path inside the package"):
        read_package(package)


def test_a_symbolic_link_is_refused(package: Path) -> None:
    other = package.parent / "other.onnx"
    (package / "model.onnx").rename(other)
    (package / "model.onnx").symlink_to(other)
    with pytest.raises(PackageError, match="is a symbolic link"):
        read_package(package)


def test_a_model_that_is_outside_the_hashed_files_is_refused(package: Path) -> None:
    trial = json.loads((package / MANIFEST).read_text())["trial"]
    trial["artifact"]["path"] = "../model.onnx"
    tamper(package, trial=trial)
    with pytest.raises(PackageError, match=r"has no SHA-256 of '\.\./model\.onnx'"):
        read_package(package)


def test_figures_of_another_file_are_refused(package: Path) -> None:
    trial = json.loads((package / MANIFEST).read_text())["trial"]
    trial["artifact"]["path"] = "fp32.onnx"
    tamper(package, trial=trial)
    with pytest.raises(PackageError, match=r"has figures for another file than 'fp32\.onnx'"):
        read_package(package)


def test_a_sample_cannot_name_a_file_elsewhere(package: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **{"../escaped": np.zeros((1, 1, 8, 8), np.float32)})
    replace_file(package, INPUTS, tmp_path / "bad.npz")
    with (
        pytest.raises(PackageError, match=r"'\.\./escaped' cannot be the name of an input"),
        read_package(package).inputs(),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 99}, "has schema 99, newer than the 1 known here"),
        ({"colour": "red"}, "Unknown key 'colour'"),
        ({"sample_items": "many"}, "`Manifest.sample_items` must be int"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(package: Path, changes: dict[str, object], said: str) -> None:
    tamper(package, **changes)
    with pytest.raises(PackageError, match=said):
        read_package(package)


def test_what_is_no_package_says_so(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"is no package: it has no manifest\.json"):
        read_package(tmp_path)
    with pytest.raises(PackageError, match="is no package: there is no such directory"):
        read_package(tmp_path / "nowhere")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(PackageError, match=r"is no package: its manifest\.json is not JSON"):
        read_package(tmp_path)


def test_a_directory_that_is_not_empty_is_left_alone(digits_run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(PackageError, match="is there already"):
        write_package(digits_run, digits_run.front().points[0], tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["notes"]


def test_an_artifact_that_is_not_what_was_scored_is_not_packed(digits_run: Run, tmp_path: Path) -> None:
    trial = digits_run.front().points[0]
    assert trial.artifact is not None
    with (digits_run.path / trial.artifact.path).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(PackageError, match=rf"is not the file that was scored as trial {trial.number}"):
        write_package(digits_run, trial, tmp_path / "package")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_run_without_files_names_the_missing_model(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    with pytest.raises(PackageError, match="the model of trial 2 is missing"):
        write_package(run, made.trials()[2], tmp_path / "package")


def test_a_package_verifies_where_it_was_made(package: Path) -> None:
    found = verify_package(package)
    assert made.but_latency(found.faults) == []
    assert found.accuracy_now == found.accuracy
    assert found.output_difference == 0
    assert found.machine == {}
    assert found.executed == {}


def test_another_model_under_corrected_hashes_does_not_verify(package: Path) -> None:
    replace_file(package, "model.onnx", package / "fp32.onnx")
    found = verify_package(package)
    assert any("latency over fp32's is" in fault for fault in found.faults)
    with pytest.raises(VerifyError, match="recorded was"):
        found.require()


def test_layers_that_run_in_another_precision_are_told(package: Path) -> None:
    trial = json.loads((package / MANIFEST).read_text())["trial"]
    layer, ran = next(iter(trial["outcome"]["executed"].items()))
    trial["outcome"]["executed"][layer] = "bf16"
    tamper(package, trial=trial)
    found = verify_package(package)
    assert found.executed == {layer: ("bf16", ran)}
    assert f"layers that run in another precision: {layer}: bf16 → {ran}" in found.lines()
    assert made.but_latency(found.faults) == []


def test_on_another_machine_a_fault_points_to_reprofile(package: Path) -> None:
    facts = json.loads((package / MANIFEST).read_text())["fingerprint"]["facts"]
    tamper(package, fingerprint={"facts": facts | {"cpu_model": "Other CPU"}})
    replace_file(package, "model.onnx", package / "fp32.onnx")
    found = verify_package(package)
    assert found.machine["cpu_model"][0] == "Other CPU"
    with pytest.raises(VerifyError, match=r"The machine is another one .* `autocompress reprofile"):
        found.require()


def test_a_task_that_does_not_load_here_is_said_and_the_sample_still_counts(package: Path) -> None:
    tamper(package, task="/nowhere/task.py")
    found = verify_package(package)
    assert found.accuracy_now is None
    assert found.accuracy_reason is not None
    assert "/nowhere/task.py" in found.accuracy_reason
    assert found.sample_items == 256
    assert made.but_latency(found.faults) == []


def test_a_file_that_the_runtime_does_not_load_fails_with_its_stage(package: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"no model at all")
    replace_file(package, "model.onnx", tmp_path / "noise")
    with pytest.raises(VerifyError, match="does not run here: load: "):
        verify_package(package)

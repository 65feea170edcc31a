"""`predict.py` as it lies in a package: what it checks, how it batches, and each runtime behind it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autocompress
from tests.tflite_files import write_linear

SOURCE = Path(autocompress.__file__).parent
# A runtime that doubles its input and says what it was opened with; of a fixed batch it takes no other.
DOUBLES = """
def open_model(path, options, outputs):
    def run(inputs):
        assert options["batch"] in (None, len(inputs["x"]))
        return {outputs[0]: inputs["x"] * 2 + options["shift"]}
    return run
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    shutil.copyfile(SOURCE / "predict.py", folder / "predict.py")
    (folder / "predict_doubles.py").write_text(DOUBLES)
    return folder


def manifest(
    folder: Path,
    *,
    runtime: str = "doubles",
    batch: int | None = None,
    path: str = "model",
    x: str = "x",
    **options: Any,
) -> None:
    """A manifest with all that `predict.py` reads; the options are of the picked file, not of fp32's."""

    def trial(own: dict[str, Any]) -> dict[str, Any]:
        inputs, outputs = [{"name": x, "shape": [batch, 2]}], [{"name": "y" if x == "x" else "output"}]
        artifact = {"path": path, "inputs": inputs, "outputs": outputs}
        return {"artifact": artifact | ({"options": own} if own else {})}

    profile = {"runtime": runtime, "options": {"batch": batch, "shift": 0}, "measure": {"threads": 1}}
    found = {"profile": profile, "trial": trial(options), "baseline": trial({})}
    (folder / "manifest.json").write_text(json.dumps(found))


def predict(
    folder: Path, *, code: int = 0, modules: Path | None = None, **inputs: Any
) -> tuple[np.ndarray | None, str]:
    """What a fresh process writes, and what it says."""
    np.savez(folder / "in.npz", **inputs)
    command = [sys.executable, str(folder / "predict.py"), str(folder / "in.npz"), str(folder / "out.npz")]
    environment = {"PATH": "", **({"PYTHONPATH": str(modules)} if modules else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    if code:
        return None, done.stderr
    with np.load(folder / "out.npz") as file:
        return next(iter(file.values())), done.stdout


X = np.arange(12, dtype=np.float32).reshape(6, 2)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_items_go_through_in_batches_that_the_model_takes(package: Path, batch: int | None) -> None:
    manifest(package, batch=batch)
    got, said = predict(package, x=X)
    assert said == "y: float32 [6, 2]\n"
    np.testing.assert_array_equal(got, 2 * X)


def test_options_of_the_file_go_before_those_of_the_profile(package: Path) -> None:
    manifest(package, shift=5)
    np.testing.assert_array_equal(predict(package, x=X)[0], 2 * X + 5)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"z": X}, "error: the model's inputs are x, got z\n"),
        ({"x": X[:5]}, "error: the number of items must be a multiple of 2, got 5\n"),
        ({"x": X[:0]}, "error: the number of items must be a multiple of 2, got 0\n"),
    ],
)
def test_inputs_that_do_not_fit_are_named(package: Path, inputs: dict[str, Any], said: str) -> None:
    manifest(package, batch=2)
    assert predict(package, code=2, **inputs)[1] == said


def test_a_runtime_that_is_not_there_is_named(package: Path) -> None:
    manifest(package, runtime="absent")
    assert predict(package, code=2, x=X)[1] == "error: No module named 'predict_absent'\n"


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("options", [{}, {"xnnpack": False}])
def test_litert_gives_what_the_weights_say(package: Path, batch: int | None, options: dict[str, Any]) -> None:
    weight, bias = np.array([[1, 2, 3], [4, 5, 6]], np.float32), np.array([0.5, 0, -1], np.float32)
    write_linear(package / "model.tflite", weight, bias, batch)
    shutil.copyfile(SOURCE / "predict_litert.py", package / "predict_litert.py")
    manifest(package, runtime="litert", batch=batch, path="model.tflite", x="input", **options)
    np.testing.assert_allclose(predict(package, input=X)[0], X @ weight + bias, rtol=1e-6)


@pytest.mark.parametrize("batch", [None, 1])
def test_of_a_cascade_both_models_answer_and_fp32_is_still_there(package: Path, batch: int | None) -> None:
    eye = np.eye(2, dtype=np.float32)
    for name, weight in (("small", eye), ("large", -eye), ("fp32", 2 * eye)):
        write_linear(package / f"{name}.tflite", weight, np.zeros(2, np.float32), batch)
    shutil.copyfile(SOURCE / "predict_litert.py", package / "predict_litert.py")
    shutil.copyfile(SOURCE / "core" / "confidence.py", package / "predict_cascade.py")
    manifest(package, runtime="litert", batch=batch, path="large.tflite", x="input")
    told = json.loads((package / "manifest.json").read_text())
    members = {n: {"artifact": told["trial"]["artifact"] | {"path": f"{n}.tflite"}} for n in ("small", "large")}
    rule = {"output": "output", "kind": "margin", "threshold": 2.0}
    told |= {
        "cascade": {**members, "rule": rule},
        "baseline": told["trial"] | {"artifact": {**told["trial"]["artifact"], "path": "fp32.tflite"}},
    }
    (package / "manifest.json").write_text(json.dumps(told))
    x = np.array([[1, 5], [1, 2], [4, 3], [9, 1]], np.float32)
    np.testing.assert_array_equal(predict(package, input=x)[0], [[1, 5], [-1, -2], [-4, -3], [9, 1]])
    code = (
        "import predict, numpy; print(predict.predict(predict.load(baseline=True), {'input': numpy.ones((2, 2), 'f')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package)
    assert "[2., 2.]" in done.stdout


GPU = Path(__file__).parent / "data" / "gpu"


@pytest.mark.parametrize(("path", "options"), [("model", {}), ("sparse", {"sparse_weights": True})])
def test_tensorrt_is_called_as_documented(package: Path, path: str, options: dict[str, Any]) -> None:
    """No GPU is here: its calls are written down in tests/data/gpu. 100 items fit only if memory is given back."""
    shutil.copyfile(SOURCE / "predict_tensorrt.py", package / "predict_tensorrt.py")
    manifest(package, runtime="tensorrt", path=path, **options)
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    np.testing.assert_array_equal(predict(package, modules=GPU, x=x)[0], 2 * x)


@pytest.mark.parametrize(
    ("path", "said"), [("unreadable", "TensorRT does not read .*: no such operator"), ("unbuildable", "does not build")]
)
def test_what_tensorrt_does_not_take_is_said(package: Path, path: str, said: str) -> None:
    shutil.copyfile(SOURCE / "predict_tensorrt.py", package / "predict_tensorrt.py")
    manifest(package, runtime="tensorrt", path=path)
    assert re.search(f"^error: .*{said}", predict(package, code=2, modules=GPU, x=X)[1])

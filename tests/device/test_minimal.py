"""What a device needs: numpy, psutil and one runtime. Installed into a fresh environment, it measures."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.contracts.cases import case_of
from tests.device.conftest import profile_of
from tests.device.elsewhere import ROOT, WORKER, ElsewhereHost
from tests.models import artifact_of, write_inputs

RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert"}
ABSENT = ("torch", "optuna", "onnx", "pydantic", "yaml", "rich")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_worker_measures_with_numpy_psutil_and_one_runtime(runtime: str, tmp_path: Path) -> None:
    case = case_of(runtime, tmp_path)
    python = fresh_python(tmp_path / "venv", "numpy", "psutil", RUNTIMES[runtime])
    assert [name for name in ABSENT if importable(python, name)] == []
    inputs, artifact = write_inputs(tmp_path / "inputs", **case.inputs), artifact_of(case.path, shape=case.shape)
    with ElsewhereHost([str(python), *WORKER], profile_of(runtime)) as host:
        (measured,) = host.measure([artifact, artifact], inputs)
        host.outputs(artifact, inputs, tmp_path / "out")
    assert measured.measured_ms > 0
    np.testing.assert_allclose(np.load(tmp_path / "out/output.npy"), case.outputs["output"], rtol=1e-5, atol=1e-6)


def fresh_python(folder: Path, *packages: str) -> Path:
    """The Python of a new environment with these packages, in the versions that are pinned, and with nothing else.

    Where they are not to be had, the test is skipped.
    """
    venv.create(folder)
    command = [
        sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "-c", str(ROOT / "constraints.txt")
    ]  # fmt: skip
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if "Could not find a version" in done.stderr or "connection" in done.stderr.lower():
        pytest.skip(f"no package index here has {' '.join(packages)}")
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "python"


def importable(python: Path, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-I", "-c", code]).returncode == 0

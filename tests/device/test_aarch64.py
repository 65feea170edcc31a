"""The worker with LiteRT's real aarch64 wheel, under user-mode emulation: same figures, and no latency.

Fetches about 100 MB, from this machine's Debian mirror and package index; skipped where those are not to be had.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autocompress.core.errors import TargetError
from autocompress.device.litert import LiteRt
from autocompress.device.process import WorkerHost
from tests.device.aarch64 import MissingError, make
from tests.device.conftest import profile_of
from tests.device.elsewhere import ROOT, WORKER, ElsewhereHost
from tests.models import artifact_of, write_inputs
from tests.tflite_files import MIXED_PRECISIONS, write_convs, write_mixed

pytestmark = pytest.mark.emulated
ITEMS = np.random.default_rng(3).normal(size=(5, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def host() -> Iterator[WorkerHost]:
    with tempfile.TemporaryDirectory() as folder:  # not under tmp_path, which keeps three of them
        try:
            machine = make(Path(folder))
        except MissingError as error:
            pytest.skip(f"aarch64: {error}")
        command, path = [*machine.command, *WORKER], f"{machine.site}:{ROOT}"
        with ElsewhereHost(command, profile_of("litert", timeout_s=120), path) as made:
            yield made


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs", input=ITEMS)


def outputs_there(host: WorkerHost, model: Path, inputs: Path, out: Path) -> NDArray[np.float32]:
    host.outputs(artifact_of(model, shape=(None, 8, 8, 3)), inputs, out)
    found: NDArray[np.float32] = np.load(out / "output.npy")
    return found


def test_float_outputs_are_those_of_this_machine(host: WorkerHost, inputs: Path, tmp_path: Path) -> None:
    model = write_convs(tmp_path / "convs.tflite")
    here = LiteRt().load(model, {"threads": 1}).run({"input": ITEMS})["output"]
    np.testing.assert_allclose(outputs_there(host, model, inputs, tmp_path / "out"), here, rtol=1e-5, atol=1e-5)


def test_integer_layers_compute_and_are_named_as_on_this_machine(
    host: WorkerHost, inputs: Path, tmp_path: Path
) -> None:
    model = write_mixed(tmp_path / "mixed.tflite")
    here = LiteRt().load(model, {"threads": 1}).run({"input": ITEMS})["output"]
    there = outputs_there(host, model, inputs, tmp_path / "out")
    assert np.abs(there - here).max() < 1e-4 * np.abs(here).max()
    assert host.executed(artifact_of(model), inputs) == MIXED_PRECISIONS


def test_fingerprint_is_that_of_the_emulated_machine_and_says_so(host: WorkerHost) -> None:
    facts = host.fingerprint().facts
    assert facts["arch"] == "aarch64"
    assert facts["cpu_model"] == "4x Cortex-A76"
    assert "asimddp" in facts["flags"].split()
    assert facts["emulator"].startswith("qemu-aarch64")


def test_latency_is_refused(host: WorkerHost, inputs: Path, tmp_path: Path) -> None:
    artifact = artifact_of(write_convs(tmp_path / "convs.tflite"), shape=(None, 8, 8, 3))
    with pytest.raises(TargetError, match=r"^qemu-aarch64\S* plays the processor here: .* is no measurement$"):
        host.measure([artifact, artifact], inputs)

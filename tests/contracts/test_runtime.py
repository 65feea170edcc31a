"""Every runtime keeps the promises of `autocompress.device.runtime`; one suite, each runtime supplies a case."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from autocompress.core.artifact import Artifact
from autocompress.core.errors import InputError, StageError
from autocompress.device.local import LocalHost
from autocompress.device.runtime import Session
from tests.contracts.cases import Case, case_of, parameters
from tests.device.conftest import profile_of
from tests.models import artifact_of, write_inputs

OPTIONS = {"threads": 1}


@pytest.fixture(params=parameters())
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return case_of(request.param, tmp_path)


@pytest.fixture
def session(case: Case) -> Iterator[Session]:
    made = case.runtime.load(case.path, OPTIONS)
    yield made
    made.close()


class TestRuntime:
    def test_says_it_is_usable_with_a_version_and_how_to_install_it(self, case: Case) -> None:
        found = case.runtime.available()
        assert found.usable
        assert found.version
        assert found.reason == ""
        assert found.install.startswith("pip install")

    def test_outputs_equal_numpy(self, case: Case, session: Session) -> None:
        found = session.run(case.inputs)
        assert list(found) == list(case.outputs)
        for name, value in case.outputs.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)

    def test_runs_any_batch_size_where_the_batch_is_free(self, case: Case, session: Session) -> None:
        for size in (1, 3) if case.batch is None else (case.batch,):
            found = session.run({"input": case.inputs["input"][:size]})
            np.testing.assert_allclose(found["output"], case.outputs["output"][:size], rtol=1e-5, atol=1e-6)

    def test_bound_call_gives_the_same_each_time_and_leaves_earlier_outputs_as_they_were(
        self, case: Case, session: Session
    ) -> None:
        call = session.bind(case.inputs)
        first = call()["output"]
        kept = first.copy()
        session.run({"input": case.inputs["input"] + 1})
        np.testing.assert_array_equal(call()["output"], kept)
        np.testing.assert_array_equal(first, kept)

    def test_closing_twice_is_harmless_and_a_run_after_it_says_so(self, case: Case, session: Session) -> None:
        session.close()
        session.close()
        with pytest.raises(InputError, match="closed"):
            session.run(case.inputs)

    def test_wrong_name_names_the_right_one(self, case: Case, session: Session) -> None:
        with pytest.raises(InputError, match=r"Unknown model input 'inputt'\. Did you mean 'input'\?"):
            session.run({"inputt": case.inputs["input"]})

    def test_missing_input_is_named(self, session: Session) -> None:
        with pytest.raises(InputError, match="model input 'input' is missing, got none"):
            session.run({})

    def test_wrong_shape_says_what_came_and_what_is_expected(self, case: Case, session: Session) -> None:
        x = case.inputs["input"]
        wanted = rf"\({case.batch or 'any'}, 4\)"
        with pytest.raises(InputError, match=rf"'input' must have shape {wanted}, got \({len(x)}, 3\)"):
            session.run({"input": x[:, :3]})
        with pytest.raises(InputError, match=rf"'input' must have shape {wanted}, got \(4,\)"):
            session.run({"input": x[0]})

    def test_wrong_dtype_says_what_came_and_what_is_expected(self, case: Case, session: Session) -> None:
        with pytest.raises(InputError, match="'input' must be float32, got float64"):
            session.run({"input": case.inputs["input"].astype(np.float64)})

    def test_executed_precision_names_what_ran_in_each_layer(self, case: Case) -> None:
        session = case.runtime.load(case.mixed, OPTIONS)
        session.run(case.mixed_inputs)
        assert session.executed_precision() == case.executed

    def test_executed_precision_needs_a_run_first(self, session: Session) -> None:
        with pytest.raises(InputError, match="only after a run"):
            session.executed_precision()

    def test_truncated_file_fails_to_load(self, case: Case, tmp_path: Path) -> None:
        content = case.path.read_bytes()
        for size in (0, len(content) // 2):
            path = tmp_path / "truncated"
            path.write_bytes(content[:size])
            with pytest.raises(StageError) as caught:
                case.runtime.load(path, OPTIONS)
            assert caught.value.stage == "load"

    def test_file_that_is_not_there_fails_to_load(self, case: Case, tmp_path: Path) -> None:
        with pytest.raises(StageError) as caught:
            case.runtime.load(tmp_path / "none", OPTIONS)
        assert caught.value.stage == "load"


@pytest.fixture
def host(case: Case) -> Iterator[LocalHost]:
    """A job of this host is a hang after 4 seconds."""
    with LocalHost(profile_of(case.runtime_name, timeout_s=4)) as made:
        yield made


@pytest.fixture
def artifact(case: Case) -> Artifact:
    return artifact_of(case.path, shape=case.shape)


@pytest.fixture
def inputs(case: Case, tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs", **case.inputs)


def stopped_worker(host: LocalHost) -> psutil.Process:
    """The host's worker, which takes jobs and does nothing with them."""
    host.fingerprint()
    (worker,) = (p for p in psutil.Process().children() if "autocompress.device.worker" in p.cmdline())
    worker.suspend()
    return worker


def assert_runs(host: LocalHost, artifact: Artifact, inputs: Path, case: Case, out: Path) -> None:
    host.outputs(artifact, inputs, out)
    for name, value in case.outputs.items():
        np.testing.assert_allclose(np.load(out / f"{name}.npy"), value, rtol=1e-5, atol=1e-6)


class TestRuntimeInTheWorker:
    def test_outputs_equal_numpy_and_latency_is_measured(
        self, case: Case, host: LocalHost, artifact: Artifact, inputs: Path, tmp_path: Path
    ) -> None:
        assert_runs(host, artifact, inputs, case, tmp_path / "out")
        (measured,) = host.measure([artifact, artifact], inputs)
        assert measured.measured_ms > 0

    def test_executed_precision_comes_through(self, case: Case, host: LocalHost, tmp_path: Path) -> None:
        folder = write_inputs(tmp_path / "mixed", **case.mixed_inputs)
        assert host.executed(artifact_of(case.mixed), folder) == case.executed

    def test_crashed_worker_fails_the_file_and_the_next_job_runs(
        self, case: Case, host: LocalHost, artifact: Artifact, inputs: Path, tmp_path: Path
    ) -> None:
        worker = stopped_worker(host)
        killing = threading.Timer(0.3, lambda: os.kill(worker.pid, signal.SIGKILL))
        killing.start()
        with pytest.raises(StageError, match="died of SIGKILL"):
            host.outputs(artifact, inputs, tmp_path / "out")
        killing.join()
        assert_runs(host, artifact, inputs, case, tmp_path / "out")

    def test_hung_worker_fails_the_file_and_the_next_job_runs(
        self, case: Case, host: LocalHost, artifact: Artifact, inputs: Path, tmp_path: Path
    ) -> None:
        worker = stopped_worker(host)
        with pytest.raises(StageError, match="hung in stage 'load' for 4 s"):
            host.outputs(artifact, inputs, tmp_path / "out")
        assert not worker.is_running()
        assert_runs(host, artifact, inputs, case, tmp_path / "out")

"""The local host over the real worker process: results, failures, and life after them."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.core.measurement import separated
from autocompress.core.record import to_json
from autocompress.device.local import LocalHost
from autocompress.device.process import WorkerProcess
from tests.device.conftest import MakeArtifact, profile_of
from tests.models import MIXED_PRECISIONS, artifact_of, write_convs, write_inputs, write_linear, write_mixed

FAKE = "tests.fakes:FakeRuntime"
OURS = {"PYTHONPATH": str(Path(__file__).parents[2])}


def workers() -> set[int]:
    """Process ids of this process's workers that still run."""
    found = set()
    for child in psutil.Process().children():
        if child.status() != psutil.STATUS_ZOMBIE and "autocompress.device.worker" in child.cmdline():
            found.add(child.pid)
    return found


def test_measures_each_artifact_against_the_first(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    reference, fast, slow = (fake_artifact(name, work_ms=ms) for name, ms in (("r", 0.4), ("f", 0.2), ("s", 0.8)))
    found = fake_host.measure([reference, fast, slow], inputs)
    assert [m.artifact_sha256 for m in found] == [fast.sha256, slow.sha256]
    assert {m.reference_sha256 for m in found} == {reference.sha256}
    assert found[0].ratio == pytest.approx(0.5, rel=0.25)
    assert found[1].ratio == pytest.approx(2.0, rel=0.25)
    assert separated(found[0].ratio_ci, found[1].ratio_ci)
    assert found[0].reference_ms == pytest.approx(0.4, rel=0.25)
    assert {m.clock for m in found} == {"process_cpu"}
    assert found[0].fingerprint.facts["runtime"] == f"{FAKE} 1.0"


def test_worker_stays_between_jobs_and_fresh_takes_another(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    pair = [fake_artifact("a"), fake_artifact("b", shift=1.0)]
    fake_host.measure(pair, inputs)
    first = workers()
    fake_host.measure(pair, inputs)
    assert workers() == first
    assert len(first) == 1
    fake_host.measure(pair, inputs, fresh=True)
    assert workers() == first


def test_outputs_of_all_items_are_written_in_their_order(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    fake_host.outputs(fake_artifact("a", scale=3.0, shift=-1.0), inputs, tmp_path / "out")
    x = np.load(inputs / "input.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "output.npy"), 3 * x - 1, rtol=1e-6)


def test_outputs_of_a_fixed_batch_go_item_by_item(fake_host: LocalHost, inputs: Path, tmp_path: Path) -> None:
    from tests.models import write_fake

    path = write_fake(tmp_path / "fixed.json", inputs={"input": ["float32", [1, 4]]})
    fake_host.outputs(artifact_of(path, shape=(1, 4)), inputs, tmp_path / "out")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "output.npy"), np.load(inputs / "input.npy"))


def test_executed_comes_back_by_name_or_not_at_all(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    assert fake_host.executed(fake_artifact("a", executed={"x": "int8"}), inputs) == {"x": "int8"}
    assert fake_host.executed(fake_artifact("b"), inputs) is None


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        ({"misbehave": {"load": "crash"}}, "load", r"died of SIGSEGV in stage 'load'.*fake: about to crash"),
        ({"misbehave": {"run": "crash"}, "after": 3}, "measure", "died of SIGSEGV in stage 'measure'"),
        ({"misbehave": {"run": "exit"}}, "measure", "ended with exit code 7"),
        ({"misbehave": {"load": "hang"}}, "load", "hung in stage 'load' for 4 s"),
        ({"misbehave": {"run": "hang"}, "after": 3}, "measure", "hung in stage 'measure' for 4 s"),
        ({"misbehave": {"load": "raise"}}, "load", "ZeroDivisionError: fake: went wrong"),
        ({"misbehave": {"run": "raise"}}, "measure", "ZeroDivisionError: fake: went wrong"),
        ({"misbehave": {"run": "nan"}}, "measure", r"output 'output' is not finite for bad\.json"),
        ({"inputs": {"x": ["float32", [None, 4]]}}, "measure", "Unknown model input 'input'"),
    ],
)
def test_a_bad_artifact_fails_in_its_stage_and_the_next_job_is_fine(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path, model: dict[str, object], stage: str, message: str
) -> None:
    good = [fake_artifact("a"), fake_artifact("b", shift=1.0)]
    with pytest.raises(StageError, match=message) as caught:
        fake_host.measure([good[0], fake_artifact("bad", **model)], inputs)
    assert caught.value.stage == stage
    assert len(fake_host.measure(good, inputs)) == 1
    assert len(workers()) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"misbehave": {"run": "nan"}, "after": 1}, "output 'output' is not finite for items"),
        ({"misbehave": {"run": "crash"}}, "died of SIGSEGV in stage 'score'"),
    ],
)
def test_scoring_fails_in_its_stage(
    fake_host: LocalHost,
    fake_artifact: MakeArtifact,
    inputs: Path,
    tmp_path: Path,
    model: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(StageError, match=message) as caught:
        fake_host.outputs(fake_artifact("bad", **model), inputs, tmp_path / "out")
    assert caught.value.stage == "score"
    fake_host.outputs(fake_artifact("good"), inputs, tmp_path / "out")


def test_what_a_runtime_prints_does_not_break_the_protocol(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    chatty = fake_artifact("chatty", misbehave={"load": "print", "run": "print"}, executed={"x": "int8"})
    assert fake_host.executed(chatty, inputs) == {"x": "int8"}


def test_a_changed_or_missing_file_fails_before_it_is_loaded(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    good, bad = fake_artifact("a"), fake_artifact("b", scale=2.0)
    content = Path(bad.path).read_bytes()
    for change, message in (
        (lambda p: p.write_bytes(content[:-5]), r"b\.json is damaged: it has \d+ bytes where \d+ were written"),
        (lambda p: p.write_bytes(content.replace(b"2.0", b"3.0")), r"b\.json is damaged: its SHA-256"),
        (lambda p: p.unlink(), r"there is no file .*b\.json"),
    ):
        change(Path(bad.path))
        with pytest.raises(StageError, match=message) as caught:
            fake_host.measure([good, bad], inputs)
        assert caught.value.stage == "load"


def test_inputs_must_be_there_and_line_up(fake_host: LocalHost, fake_artifact: MakeArtifact, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"holds no \.npy file"):
        fake_host.executed(fake_artifact("a"), tmp_path / "none")
    uneven = write_inputs(tmp_path / "uneven", a=np.zeros((2, 4), np.float32), b=np.zeros((3, 4), np.float32))
    with pytest.raises(StageError, match="must have the same number of items"):
        fake_host.executed(fake_artifact("a"), uneven)


def test_an_unusable_or_unknown_runtime_is_no_fault_of_an_artifact() -> None:
    with (
        LocalHost(profile_of("tests.fakes:UnusableRuntime")) as host,
        pytest.raises(TargetError, match="fake is not installed"),
    ):
        host.fingerprint()
    with LocalHost(profile_of("onnxruntme")) as host, pytest.raises(TargetError, match="Did you mean 'onnxruntime'"):
        host.fingerprint()


def test_a_worker_that_cannot_start_is_no_fault_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is broken')")
    with (
        LocalHost(profile_of(FAKE), environment={"PYTHONPATH": str(tmp_path)}) as host,
        pytest.raises(TargetError, match=r"does not start: it ended with exit code 1.*numpy is broken"),
    ):
        host.fingerprint()


def test_a_worker_that_died_while_idle_is_replaced(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    fake_host.fingerprint()
    (pid,) = workers()
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(timeout=5)
    assert fake_host.executed(fake_artifact("a"), inputs) is None


def test_closing_twice_ends_the_worker_and_the_host_can_be_used_again(fake_host: LocalHost) -> None:
    fake_host.fingerprint()
    fake_host.close()
    fake_host.close()
    assert workers() == set()
    assert fake_host.fingerprint().facts


def test_an_interrupted_job_ends_its_worker(fake_artifact: MakeArtifact, inputs: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with LocalHost(profile_of(FAKE)) as host:
            host.fingerprint()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                host.executed(fake_artifact("a", misbehave={"run": "hang"}), inputs)
            assert workers() == set()
            assert host.fingerprint().facts
    finally:
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_does_not_reach_the_worker(fake_host: LocalHost) -> None:
    fake_host.fingerprint()
    (pid,) = workers()
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert fake_host.fingerprint().facts
    assert workers() == {pid}


@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_leaves_when_its_parent_is_killed(fake_artifact: MakeArtifact, inputs: Path, busy: bool) -> None:
    job = "host.executed(artifact, inputs)" if busy else "time.sleep(60)"
    artifact = fake_artifact("a", misbehave={"run": "hang"})
    script = f"""
import time
from pathlib import Path
from autocompress.core.artifact import Artifact, TensorSpec
from tests.device.conftest import profile_of
from tests.device.test_local import workers
from autocompress.device.local import LocalHost
artifact, inputs = {artifact!r}, Path({str(inputs)!r})
host = LocalHost(profile_of({FAKE!r}))
host.fingerprint()
print(*workers(), flush=True)
{job}
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    assert worker.is_running()
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([worker], timeout=5)[1] == []


def test_a_worker_whose_host_has_vanished_ends_what_hangs(fake_artifact: MakeArtifact, inputs: Path) -> None:
    """The kernel's alarm ends it: native code that holds Python's lock could not be left otherwise."""
    artifact = fake_artifact("a", misbehave={"run": "hang"})
    job = {"job": "executed", "runtime": FAKE, "options": {"threads": 1}, "artifacts": [to_json(artifact)]}
    worker = WorkerProcess([sys.executable, "-P", "-m", "autocompress.device.worker"], 30, environment=OURS)
    with pytest.raises(StageError, match="died of SIGALRM in stage 'measure'"):
        worker.ask({**job, "inputs": str(inputs), "limit_s": 0.5})


def test_threads_are_said_in_one_place() -> None:
    import dataclasses

    profile = dataclasses.replace(profile_of(FAKE), options={"threads": 2})
    with pytest.raises(InputError, match=r"`options\.threads` is 2 and `measure\.threads` is 1"):
        LocalHost(profile)


def test_energy_is_a_number_or_a_reason(fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path) -> None:
    found = fake_host.energy(fake_artifact("a"), inputs)
    assert found if isinstance(found, str) else found > 0


BLOCKER = """
import sys
BLOCKED = {"torch", "optuna", "onnx", "pydantic", "yaml", "rich"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked on the device side")
sys.meta_path.insert(0, Blocker())
"""


def test_onnxruntime_does_everything_where_the_training_side_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    environment = {"PYTHONPATH": str(tmp_path / "blocker")}
    inputs = write_inputs(tmp_path / "inputs", input=np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype("f4"))
    mixed = artifact_of(write_mixed(tmp_path / "mixed.onnx"), shape=(None, 3, 8, 8))
    for module in ("torch", "yaml"):  # the blocker works
        with (
            LocalHost(profile_of(f"{module}:x"), environment=environment) as host,
            pytest.raises(TargetError, match=f"{module} is blocked on the device side"),
        ):
            host.fingerprint()
    with LocalHost(profile_of("onnxruntime"), environment=environment) as host:
        (measured,) = host.measure([mixed, mixed], inputs)
        assert measured.ratio == pytest.approx(1.0, rel=0.2)
        assert host.executed(mixed, inputs) == MIXED_PRECISIONS
        host.outputs(mixed, inputs, tmp_path / "out")
        assert host.peak_memory(mixed, inputs) > 0
        assert host.fingerprint().facts["runtime"].startswith("onnxruntime 1.")
    assert np.load(tmp_path / "out" / "output.npy").shape == (9, 3)


def test_peak_memory_grows_with_the_weights_and_not_with_what_ran_before(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs", input=np.zeros((2, 512), np.float32))
    rng = np.random.default_rng(0)
    sizes = {}
    with LocalHost(profile_of("onnxruntime")) as host:
        for width in (8, 8192):
            weight = rng.normal(size=(512, width)).astype(np.float32)
            path = write_linear(tmp_path / f"{width}.onnx", weight, np.zeros(width, np.float32))
            artifact = artifact_of(path, shape=(None, 512), outputs=(None, width))
            sizes[width] = host.peak_memory(artifact, inputs)
    weights = 512 * 8192 * 4
    assert weights < sizes[8192] < 6 * weights
    assert sizes[8] < sizes[8192] - weights / 2


def test_a_truncated_onnx_file_that_was_recorded_so_fails_to_load(tmp_path: Path) -> None:
    path = write_convs(tmp_path / "convs.onnx", 2)
    path.write_bytes(path.read_bytes()[:-1000])
    inputs = write_inputs(tmp_path / "inputs", input=np.zeros((1, 16, 16, 16), np.float32))
    with LocalHost(profile_of("onnxruntime")) as host, pytest.raises(StageError, match="onnxruntime: ") as caught:
        host.measure([artifact_of(path)] * 2, inputs)
    assert caught.value.stage == "load"


def test_more_work_takes_longer_by_separated_intervals(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs", input=np.zeros((1, 16, 16, 16), np.float32))
    small, large = (artifact_of(write_convs(tmp_path / f"{n}.onnx", n)) for n in (4, 6))
    with LocalHost(profile_of("onnxruntime", min_blocks=8, turn_s=0.006, max_duration_s=1.5)) as host:
        (found,) = host.measure([large, small], inputs)
    assert separated(found.ratio_ci, (1.0, 1.0))
    assert math.isclose(found.ratio, 4 / 6, rel_tol=0.15)


def test_a_worker_process_says_what_it_said_last() -> None:
    worker = WorkerProcess([sys.executable, "-P", "-m", "autocompress.device.worker"], 30)
    with pytest.raises(TargetError, match=r"KeyError: 'runtime'"):
        worker.ask({"job": "measure"})
    assert not worker.alive

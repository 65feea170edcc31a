"""Hosts over ssh, against a real sshd on the loopback interface and the real worker."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from autocompress.core.cascade import LARGE, Cascade, Rule
from autocompress.core.confidence import confidence
from autocompress.core.errors import StageError, TargetError
from autocompress.device import bootstrap, ssh
from autocompress.device.hosts import open_host
from autocompress.device.lock import measuring_lock
from autocompress.device.ssh import PYTHON_VARIABLE, SshHost
from tests.device.conftest import MakeArtifact, profile_of
from tests.device.sshd import ROOT, Sshd, serving
from tests.models import MIXED_PRECISIONS, artifact_of, write_inputs, write_mixed
from tests.test_architecture import imports

FAKE = "tests.fakes:FakeRuntime"
OURS = {"PYTHONPATH": str(ROOT)}  # where the fake is


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serving(tmp_path_factory.mktemp("sshd")) as found:
        (found.home / ".bashrc").write_text("echo Welcome to this board\n")
        yield found


@pytest.fixture
def host(server: Sshd) -> Iterator[SshHost]:
    """Runs the fake there; a job is a hang after 4 seconds, and a lost device is waited for as long."""
    user, _, port = server.name.removeprefix("ssh:").rpartition(":")
    with SshHost(user, int(port), profile_of(FAKE, timeout_s=4), environment=OURS, return_s=4) as found:
        yield found


def during(host: SshHost, artifact: object, inputs: Path, act: Callable[[], None]) -> StageError:
    """What a job that hangs fails of when `act` happens meanwhile."""
    host.fingerprint()
    timer = threading.Timer(0.5, act)
    timer.start()
    with pytest.raises(StageError) as caught:
        host.executed(artifact, inputs)  # type: ignore[arg-type]
    timer.join()
    return caught.value


def gone(workers: list[psutil.Process]) -> bool:
    return psutil.wait_procs(workers, timeout=5)[1] == []


def files(server: Sshd, folder: str) -> dict[str, int]:
    """Name → inode of the device's files in a folder."""
    return {p.name: p.stat().st_ino for p in (server.home / ".cache/autocompress" / folder).rglob("*") if p.is_file()}


def test_every_job_gives_there_what_it_gives_here(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    reference, fast = (
        fake_artifact("r", work_ms=0.4),
        fake_artifact("f", work_ms=0.2, scale=3.0, executed={"x": "int8"}),
    )
    for fresh in (False, True):
        (found,) = host.measure([reference, fast], inputs, fresh=fresh)
        assert found.ratio == pytest.approx(0.5, rel=0.25)
    assert found.fingerprint == host.fingerprint()
    assert host.executed(fast, inputs) == {"x": "int8"}
    assert host.peak_memory(fast, inputs) > 0
    assert host.reasons == {}
    host.outputs(fast, inputs, tmp_path / "out")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "output.npy"), 3 * np.load(inputs / "input.npy"), rtol=1e-6)
    assert len(server.workers()) == 1


def test_a_cascade_runs_there_as_it_does_here(
    host: SshHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    reference, small, large = (
        fake_artifact(n, work_ms=w, scale=s) for n, w, s in (("r", 1, 1), ("s", 0.2, 1), ("l", 0.8, -1))
    )
    x = np.load(inputs / "input.npy")
    sure = confidence(x, "margin")
    rule = Rule(output="output", kind="margin", threshold=float(np.median(sure)))
    cascade = Cascade(small=small, large=large, rule=rule)
    host.outputs(cascade, inputs, tmp_path / "out")
    unsure = np.load(tmp_path / "out" / f"{LARGE}.npy")
    np.testing.assert_array_equal(unsure, sure < rule.threshold)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "output.npy"), np.where(unsure[:, None], -x, x))
    rows = [int(np.argmin(sure)), int(np.argmax(sure))]
    (found,) = host.measure([reference, cascade], inputs, rows=rows)
    assert found.ratio == pytest.approx(0.2 + 0.8 / 2, abs=0.1)


def test_files_are_copied_once_by_hash_and_outputs_do_not_stay(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    artifact = fake_artifact("a", note=str(tmp_path))
    host.executed(artifact, inputs)
    before = files(server, "models"), files(server, "inputs")
    assert f"{artifact.sha256}.json" in before[0]
    copy = artifact_of(Path(shutil.copy(artifact.path, tmp_path / "copy.json")))
    same = Path(shutil.copytree(inputs, tmp_path / "same"))
    host.outputs(copy, same, tmp_path / "out")
    assert (files(server, "models"), files(server, "inputs")) == before
    assert files(server, "outputs") == {}


def test_outputs_larger_than_a_piece_come_back_whole(
    host: SshHost, fake_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "PIECE", 1000)
    x = np.random.default_rng(0).normal(size=(90_000, 4)).astype(np.float32)
    host.outputs(fake_artifact("a"), write_inputs(tmp_path / "in", input=x[:300]), tmp_path / "one")
    np.testing.assert_array_equal(np.load(tmp_path / "one" / "output.npy"), x[:300])
    monkeypatch.undo()
    host.outputs(fake_artifact("a"), write_inputs(tmp_path / "large", input=x), tmp_path / "two")
    np.testing.assert_array_equal(np.load(tmp_path / "two" / "output.npy"), x)


def test_a_worker_that_is_killed_fails_the_job_and_another_takes_the_next(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    error = during(host, fake_artifact("a", misbehave={"run": "hang"}), inputs, lambda: server.workers()[0].kill())
    assert str(error).startswith(f"{server.name}: the worker process died of SIGKILL in stage 'measure'")
    assert host.executed(fake_artifact("b"), inputs) is None


def test_a_worker_that_hangs_is_given_up_and_does_not_stay_there(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    host.fingerprint()
    workers = server.workers()
    with pytest.raises(StageError, match=re.escape(f"{server.name}: the worker process hung in stage 'load' for 4 s")):
        host.executed(fake_artifact("a", misbehave={"load": "hang"}), inputs)
    assert gone(workers)
    assert host.executed(fake_artifact("b"), inputs) is None


def test_a_cut_connection_fails_the_job_and_the_device_can_come_back(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    hangs = fake_artifact("a", misbehave={"run": "hang"})
    host.fingerprint()
    workers = server.workers()
    error = during(host, hangs, inputs, server.cut)
    assert error.stage == "measure"
    assert str(error).startswith(f"{server.name}: the worker process lost its connection in stage 'measure'")
    assert gone(workers)
    assert host.executed(fake_artifact("b"), inputs) is None


def test_a_device_that_is_away_is_waited_for_and_not_for_ever(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    artifact = fake_artifact("a")
    host.executed(artifact, inputs)
    server.cut()
    server.stop()
    timer = threading.Timer(1.0, server.start)
    timer.start()
    assert host.executed(artifact, inputs) is None
    timer.join()
    server.cut()
    server.stop()
    try:
        with pytest.raises(TargetError, match=re.escape(server.name) + ": .*Connection refused"):
            host.executed(artifact, inputs)
    finally:
        server.start()


def test_a_device_that_was_never_there_is_said_at_once(server: Sshd) -> None:
    with open_host("ssh:nobody@127.0.0.1:1", profile_of(FAKE)) as host:
        begin = time.monotonic()
        with pytest.raises(TargetError, match=r"ssh:nobody@127\.0\.0\.1:1: .*lost its connection.*Connection refused"):
            host.fingerprint()
        assert time.monotonic() - begin < 5


def test_an_unknown_host_key_is_refused(server: Sshd) -> None:
    with (
        open_host(server.name.replace("127.0.0.1", "localhost"), profile_of(FAKE)) as host,
        pytest.raises(TargetError, match="Host key verification failed"),
    ):
        host.fingerprint()


def test_a_runtime_that_is_not_usable_there_is_no_fault_of_an_artifact(server: Sshd) -> None:
    profile = profile_of("tests.fakes:UnusableRuntime")
    with (
        open_host(server.name, profile, OURS) as host,
        pytest.raises(TargetError, match=re.escape(f"{server.name}: fake is not installed")),
    ):
        host.fingerprint()


@pytest.mark.parametrize(
    "bad", ["$(touch pwned)", "; touch pwned", "`touch pwned`", "' && touch pwned '", "| touch pwned"]
)
def test_no_metacharacter_in_a_path_or_a_name_does_anything(
    server: Sshd, tmp_path: Path, inputs: Path, bad: str, monkeypatch: pytest.MonkeyPatch, fake_artifact: MakeArtifact
) -> None:
    model = Path(shutil.copy(fake_artifact("a").path, tmp_path / f"model.json{bad}"))
    there = Path(shutil.copytree(inputs, tmp_path / f"inputs{bad}"))
    with open_host(server.name, profile_of(FAKE), {**OURS, "NOTE": bad}) as host:
        host.outputs(artifact_of(model), there, tmp_path / f"out{bad}")
    monkeypatch.setenv(PYTHON_VARIABLE, f"python3{bad}")
    with open_host(server.name, profile_of(FAKE), OURS) as host, pytest.raises(TargetError, match="there is no Python"):
        host.fingerprint()
    assert not list(itertools.chain(server.folder.rglob("pwned*"), tmp_path.rglob("pwned*"), Path.cwd().glob("pwned*")))
    assert not Path("~/pwned").expanduser().exists()


def test_a_full_disk_there_fails_the_job_by_name_and_leaves_no_parts(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, tmp_path: Path
) -> None:
    small = server.home / ".cache/autocompress/inputs"
    small.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        large = write_inputs(tmp_path / "large", input=np.zeros((100_000, 4), np.float32))
        with pytest.raises(
            StageError, match=re.escape(server.name) + r": OSError: .*No space left on device"
        ) as caught:
            host.executed(fake_artifact("a"), large)
        assert caught.value.stage == "load"
        assert files(server, "inputs") == {}
        fine = write_inputs(tmp_path / "fine", input=np.zeros((4, 4), np.float32))
        assert host.executed(fake_artifact("a"), fine) is None
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_file_that_changed_on_the_way_is_refused(
    server: Sshd, host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    artifact = fake_artifact("a", note="changed")
    Path(artifact.path).write_bytes(Path(artifact.path).read_bytes().replace(b"changed", b"CHANGED"))
    with pytest.raises(StageError, match=r"a\.json is damaged: its SHA-256 is not"):
        host.executed(artifact, inputs)
    Path(artifact.path).unlink()
    with pytest.raises(StageError, match=r"there is no file .*a\.json"):
        host.executed(artifact, inputs)
    assert not [name for name in files(server, "models") if name.endswith(".part")]


def test_the_device_measures_one_thing_at_a_time_and_waiting_is_no_hang(
    host: SshHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    pair = [fake_artifact("a"), fake_artifact("b", shift=1.0)]
    host.measure(pair, inputs)
    found: list[float] = []
    with measuring_lock():
        begin = time.monotonic()
        waiting = threading.Thread(
            target=lambda: found.append(len(host.measure(pair, inputs)) + time.monotonic() - begin)
        )
        waiting.start()
        waiting.join(timeout=5)
        assert waiting.is_alive()
    waiting.join()
    assert found[0] > 6


def test_a_small_installation_is_made_there_once(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy, psutil and ONNX Runtime, from a package index."""
    monkeypatch.delenv(PYTHON_VARIABLE)
    inputs = write_inputs(tmp_path / "inputs", input=np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype("f4"))
    mixed = artifact_of(write_mixed(tmp_path / "mixed.onnx"), shape=(None, 3, 8, 8))
    with open_host(server.name, profile_of("onnxruntime")) as host:
        assert host.executed(mixed, inputs) == MIXED_PRECISIONS
        (environment,) = (server.home / ".cache/autocompress/venv").iterdir()
        made = (environment / "ready").stat().st_mtime_ns
        site = next(environment.glob("lib/*/site-packages"))
        assert not {"torch", "optuna", "onnx", "pydantic"} & {p.name for p in site.iterdir()}
        host.measure([mixed, mixed], inputs, fresh=True)
    assert (environment / "ready").stat().st_mtime_ns == made


def test_what_cannot_be_installed_is_said(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE)
    monkeypatch.setattr(ssh, "BASE", ("no such requirement",))
    with open_host(server.name, profile_of(FAKE)) as host, pytest.raises(TargetError, match="Invalid requirement"):
        host.fingerprint()


def test_what_is_installed_there_is_what_the_package_asks_for_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(ssh.BASE) <= set(project["dependencies"])
    extras = set(itertools.chain.from_iterable(project["optional-dependencies"].values()))
    assert set(itertools.chain.from_iterable(ssh.REQUIREMENTS.values())) <= extras


def test_the_first_thing_that_runs_there_is_read_by_an_old_python() -> None:
    source = Path(bootstrap.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    tops = {i.module.split(".")[0] for i in imports("autocompress.device.bootstrap")}
    assert tops <= set(sys.stdlib_module_names)

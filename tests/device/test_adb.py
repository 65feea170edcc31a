"""Android devices, through a scripted `adb`: its shell is a real one whose /data/local/tmp is a folder here.

The lines of `benchmark_model` are as it prints them; times in them come from the model file.
"""

import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.errors import StageError, TargetError
from autocompress.core.measurement import separated
from autocompress.device import adb
from autocompress.device.adb import NOT_COMPUTED, TOOL_VARIABLE, AdbHost
from autocompress.device.hosts import open_host
from tests.device.conftest import MakeArtifact, profile_of

ADB = """#!/usr/bin/env python3
import os, re, shutil, subprocess, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
phone = os.path.join(folder, "phone")
state = open(os.path.join(folder, "state")).read().strip()
with open(os.path.join(folder, "calls"), "a") as log:
    print(*sys.argv[1:], file=log)
assert sys.argv[1:3] == ["-s", "ABC123"], sys.argv
job, *rest = sys.argv[3:]
def here(text):
    return text.replace("/data/local/tmp", phone)
if job == "wait-for-device":
    while open(os.path.join(folder, "state")).read().strip() != "device":
        time.sleep(0.05)
    sys.exit(0)
if state != "device":
    sys.exit("error: " + state)
if job == "get-state":
    print("device")
elif job == "push":
    if os.path.exists(os.path.join(folder, "full")):
        sys.exit("adb: error: failed to copy: remote write failed: No space left on device")
    shutil.copy(rest[0], here(rest[1]))
elif job == "shell":
    (script,) = rest
    env = {**os.environ, "PATH": os.path.join(folder, "bin") + ":" + os.environ["PATH"]}
    sys.exit(subprocess.run(["sh", "-c", here(script)], env=env).returncode)
"""

TOOL = """#!/usr/bin/env python3
import json, os, signal, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
model = json.load(open(given["graph"]))
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "runs"), "a") as log:
    print(json.dumps(given), file=log)
how = model.get("misbehave", {}).get("run")
if how == "crash":
    print("ERROR: Failed to apply delegate", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGSEGV)
if how == "hang":
    time.sleep(60)
us = model.get("work_ms", 1.0) * 1000
print("INFO: STARTING!")
print(f"INFO: count=50 first={us} curr={us} min={us} max={us} avg={us} std=1")
if how != "silent":
    print(f"INFO: Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3, "
          f"Inference (avg): {us:.6g}", file=sys.stderr)
    print("INFO: Memory footprint delta from the start of the tool (MB): init=3.5 overall=6.25")
"""

PROPERTIES = """#!/bin/sh
case $1 in
  ro.product.manufacturer) echo Google;;
  ro.product.model) echo "Pixel 9";;
  ro.board.platform) echo zumapro;;
  ro.build.version.release) echo 15;;
esac
"""


class Phone:
    """What the scripted adb shows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "phone" / "autocompress"
        (folder / "phone").mkdir()
        (folder / "bin").mkdir()
        for path, text in (("adb", ADB), ("benchmark_model", TOOL), ("bin/getprop", PROPERTIES)):
            (folder / path).write_text(text)
            (folder / path).chmod(0o755)
        self.set("device")

    def set(self, state: str) -> None:
        (self.folder / "state").write_text(state)

    def calls(self, job: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"-s ABC123 {job}")]

    def runs(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.root / "runs").read_text().splitlines()]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    folder = tmp_path / "adb"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv(TOOL_VARIABLE, str(folder / "benchmark_model"))
    return Phone(folder)


@pytest.fixture
def host(phone: Phone) -> Iterator[AdbHost]:
    profile = profile_of("tests.fakes:FakeRuntime", timeout_s=10, max_duration_s=60)
    with AdbHost("ABC123", profile, return_s=5) as found:
        yield found


def test_artifacts_take_turns_and_each_turn_is_a_run_of_the_tool(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    reference, fast = fake_artifact("r", work_ms=2.0), fake_artifact("f", work_ms=0.5)
    (found,) = host.measure([reference, fast], inputs, fresh=True)
    assert found.ratio == pytest.approx(0.25)
    assert found.reference_ms == pytest.approx(2.0)
    assert separated(found.ratio_ci, (1.0, 1.0))
    assert found.clock == "wall"
    graphs = ["r" if Path(run["graph"]).stem == reference.sha256 else "f" for run in phone.runs()]
    assert "".join(graphs) == "rffrfrrfrffr"
    run = phone.runs()[0]
    assert run["num_threads"] == "1"
    assert run["use_xnnpack"] == "true"
    assert (run["warmup_runs"], run["warmup_min_secs"], run["min_secs"]) == ("2", "0.001", "0.001")


def test_averages_of_slow_models_are_read_too(host: AdbHost, fake_artifact: MakeArtifact, inputs: Path) -> None:
    """The tool writes a million microseconds and more as 2.5e+06."""
    slow = fake_artifact("slow", work_ms=2.5e6)
    (found,) = host.measure([slow, slow], inputs)
    assert found.measured_ms == pytest.approx(2.5e6)


def test_files_and_the_tool_are_pushed_once(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    pair = [fake_artifact("a"), fake_artifact("b", work_ms=2.0)]
    host.measure(pair, inputs)
    host.measure(pair, inputs)
    assert len(phone.calls("push")) == 3
    assert {p.suffix for p in phone.root.iterdir() if p.name not in ("runs", "lock")} == {".tflite", ".bin"}


def test_models_used_longest_ago_go(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "KEPT_MODELS", 2)
    made = [fake_artifact(str(i), shift=float(i)) for i in range(3)]
    for artifact in made:
        host.peak_memory(artifact, inputs)
        time.sleep(0.02)
    assert {p.stem for p in phone.root.glob("*.tflite")} == {a.sha256 for a in made[1:]}


def test_the_device_says_what_it_is(host: AdbHost) -> None:
    facts = host.fingerprint().facts
    assert facts["cpu_model"] == "Google Pixel 9, zumapro"
    assert facts["os"] == "Android 15"
    assert facts["cores"].isdecimal()
    assert re.fullmatch(r"benchmark_model [0-9a-f]{12}", facts["runtime"])


def test_what_the_device_cannot_tell_has_a_reason(
    host: AdbHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    artifact = fake_artifact("a", scale=2.0, executed={"x": "int8"})
    assert host.peak_memory(artifact, inputs) == 6.25 * 2**20
    assert host.executed(artifact, inputs) is None
    assert "without root" in host.energy(artifact, inputs)
    assert host.reasons == {"accuracy": NOT_COMPUTED}
    host.outputs(artifact, inputs, tmp_path / "out")
    x = np.load(inputs / "input.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "output.npy"), 2 * x, rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("crash", r"adb:ABC123: adb ended with exit code 139: .*Failed to apply delegate"),
        ("silent", r"adb:ABC123: benchmark_model tells no figure: .*STARTING!"),
        ("hang", r"adb:ABC123: benchmark_model did not end within 1 s"),
    ],
)
def test_a_bad_artifact_fails_and_the_next_one_is_fine(
    phone: Phone, fake_artifact: MakeArtifact, inputs: Path, how: str, message: str
) -> None:
    good = fake_artifact("good")
    with AdbHost("ABC123", profile_of("tests.fakes:FakeRuntime", timeout_s=1.0 if how == "hang" else 10)) as host:
        with pytest.raises(StageError, match=message) as caught:
            host.measure([good, fake_artifact("bad", misbehave={"run": how})], inputs)
        assert caught.value.stage == "measure"
        assert host.measure([good, good], inputs)


def test_a_device_that_is_lost_can_come_back(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    artifact = fake_artifact("a")
    host.peak_memory(artifact, inputs)
    phone.set("device 'ABC123' not found")
    timer = threading.Timer(0.5, phone.set, ["device"])
    timer.start()
    assert host.peak_memory(artifact, inputs)
    timer.join()


def test_a_device_that_is_not_there_is_said_at_once(phone: Phone, host: AdbHost) -> None:
    phone.set("device unauthorized")
    with pytest.raises(TargetError, match="adb:ABC123: the device is not there: error: device unauthorized"):
        host.fingerprint()


def test_a_full_device_fails_the_artifact_by_name(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    host.fingerprint()
    (phone.folder / "full").touch()
    with pytest.raises(StageError, match=r"adb:ABC123: .*No space left on device") as caught:
        host.peak_memory(fake_artifact("a"), inputs)
    assert caught.value.stage == "load"


def test_the_device_measures_one_thing_at_a_time(
    phone: Phone, host: AdbHost, fake_artifact: MakeArtifact, inputs: Path
) -> None:
    import fcntl

    artifact = fake_artifact("a")
    host.peak_memory(artifact, inputs)
    with (phone.root / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(1.5, fcntl.flock, [lock, fcntl.LOCK_UN])
        begin = time.monotonic()
        timer.start()
        host.peak_memory(artifact, inputs)
        assert time.monotonic() - begin >= 1.5
        timer.join()


def test_options_of_the_tool_reach_it_and_nothing_in_them_acts(
    phone: Phone, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    bad = "$(touch pwned); touch pwned"
    own = phone.folder / "phone" / f"tool {bad}"
    shutil.copy(phone.folder / "benchmark_model", own)
    own.chmod(own.stat().st_mode | stat.S_IXUSR)
    profile = profile_of("tests.fakes:FakeRuntime", timeout_s=10)
    profile = replace(profile, options={"benchmark_model": f"/data/local/tmp/{own.name}", "taskset": "3"})
    with open_host("adb:ABC123", profile) as host:
        host.outputs(fake_artifact("a"), inputs, tmp_path / "out")  # LiteRT is not given what it does not know
        assert host.peak_memory(fake_artifact("a"), inputs)
    wrong = replace(profile, options={**profile.options, "taskset": "0; touch pwned"})
    with open_host("adb:ABC123", wrong) as host, pytest.raises(StageError, match=r"exit code \d+"):
        host.peak_memory(fake_artifact("a"), inputs)
    assert any("taskset 3 " in call for call in phone.calls("shell"))
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_without_the_tool_or_adb_it_says_what_to_do(
    phone: Phone, host: AdbHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOOL_VARIABLE)
    with pytest.raises(TargetError, match=f"no benchmark_model to measure with: set {TOOL_VARIABLE}"):
        host.fingerprint()
    monkeypatch.setenv("PATH", str(phone.folder / "bin"))
    with pytest.raises(TargetError, match="adb is not installed: install Android's platform tools"):
        host.fingerprint()

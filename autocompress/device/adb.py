"""An Android device by adb: the vendor's `benchmark_model` times a file there, LiteRT on this machine computes outputs.

The tool prints averages only, so each turn of a block is one run of it in a process of its own, and gives one sample.
Everything that a command on the device is made of is quoted: adb hands it to a shell there.
"""
# ruff: noqa: ARG002 (the tool makes its own inputs, and each run of it is a fresh process)

import contextlib
import dataclasses
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.cascade import Cascade, Runnable
from autocompress.core.errors import StageError, TargetError
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.device.local import LocalHost
from autocompress.device.process import GRACE_S, measurements
from autocompress.device.timing import done, order

# Path on this machine of the `benchmark_model` built for the device. It comes from the user: no package brings it.
TOOL_VARIABLE = "AUTOCOMPRESS_BENCHMARK_MODEL"
# Options of the profile that are for the tool and not for LiteRT: its path on the device, and taskset's mask of cores.
TOOL_OPTIONS = ("benchmark_model", "taskset")
ROOT = "/data/local/tmp/autocompress"  # the one place where adb's user may write and execute
BUSY = 75  # EX_TEMPFAIL
BUSY_S = 0.5
KILLED = (124, 137)  # of `timeout`, by its version
RETURN_S = 180.0
KEPT_MODELS = 64

NOT_COMPUTED = "computed by LiteRT on the searching machine, not on the device: benchmark_model keeps no outputs"
NOT_KNOWN = "adb gives no energy counter of a phone that can be read without root"

_ASK = (
    "echo maker=$(getprop ro.product.manufacturer); echo model=$(getprop ro.product.model); "
    "echo board=$(getprop ro.board.platform); echo release=$(getprop ro.build.version.release); "
    "echo arch=$(uname -m); echo kernel=$(uname -sr); echo cores=$(nproc); "
    "echo memory=$(grep MemTotal /proc/meminfo); echo features=$(grep -m1 Features /proc/cpuinfo)"
)
_AVERAGE = re.compile(r"Inference timings in us: .*Inference \(avg\): ([\d.e+]+)")
_MEMORY = re.compile(r"footprint.*\(MB\): init=[\d.e+-]+ overall=([\d.e+-]+)")


class AdbHost:
    """Measures on the device with this serial number."""

    def __init__(
        self,
        serial: str,
        profile: Profile,
        *,
        environment: Mapping[str, str] | None = None,
        return_s: float = RETURN_S,
    ) -> None:
        self._serial, self._where, self._profile, self._return_s = serial, f"adb:{serial}", profile, return_s
        options = {name: value for name, value in profile.options.items() if name not in TOOL_OPTIONS}
        self._local = LocalHost(dataclasses.replace(profile, options=options), environment=environment)
        self._reached = False

    @property
    def reasons(self) -> Mapping[str, str]:
        """Accuracy is not the device's own."""
        return {"accuracy": NOT_COMPUTED}

    def measure(
        self, artifacts: Sequence[Runnable], inputs: Path, *, fresh: bool = False, rows: Sequence[int] = (0,)
    ) -> list[Measurement]:
        """Latency of `artifacts[1:]` against `artifacts[0]`, taking turns; every turn is a fresh process anyway.

        Raises:
            TargetError: there is a cascade among them.
        """
        files = [self._file(artifact) for artifact in artifacts]
        plan = self._profile.measure
        found, tool = self.fingerprint(), self._bench()
        paths = [self._taken(Path(a.path), a.sha256) for a in files]
        blocks: list[tuple[tuple[float, ...], ...]] = []
        begin = time.monotonic()
        while not done(blocks, plan, round((time.monotonic() - begin) * 1e9)):
            samples: list[list[float]] = [[] for _ in artifacts]
            for i in order(len(artifacts), len(blocks)):
                samples[i].append(self._told(tool, paths[i], _AVERAGE) / 1000)
            blocks.append(tuple(tuple(s) for s in samples))
        return measurements(artifacts, blocks, "wall", self._profile, found)

    def outputs(self, artifact: Runnable, inputs: Path, out: Path) -> None:
        """Run all items in LiteRT on this machine."""
        self._local.outputs(artifact, inputs, out)

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        """None: the tool does not tell."""
        return None

    def diagnose(self, artifact: Artifact, inputs: Path) -> dict[str, str]:
        """Nothing: the tool does not tell."""
        return {}

    def peak_memory(self, artifact: Runnable, inputs: Path) -> int:
        """Bytes that loading and running the file adds to the tool's process there, as the tool tells."""
        file = self._file(artifact)
        self._connect()
        path = self._taken(Path(file.path), file.sha256)
        return max(1, round(self._told(self._bench(), path, _MEMORY) * 2**20))

    def energy(self, artifact: Artifact, inputs: Path) -> str:
        """Why it is not known."""
        return NOT_KNOWN

    def fingerprint(self) -> Fingerprint:
        """What the device says of itself, and which tool measures there."""
        self._connect()
        tool = shlex.quote(self._bench())
        said = self._shell("load", f"{_ASK}; echo tool=$(sha256sum {tool})")
        found = dict(line.strip().partition("=")[::2] for line in said.splitlines())
        try:
            return Fingerprint(
                facts={
                    "cpu_model": f"{found['maker']} {found['model']}, {found['board']}",
                    "arch": found["arch"],
                    "cores": found["cores"],
                    "flags": found["features"].partition(":")[2].strip(),
                    "memory": f"{int(found['memory'].split()[1]) / 2**20:.1f} GiB",
                    "os": f"Android {found['release']}",
                    "kernel": found["kernel"],
                    "runtime": f"benchmark_model {found['tool'].split()[0][:12]}",
                }
            )
        except (KeyError, ValueError, IndexError) as error:
            raise TargetError(f"{self._where}: the device does not say what it is, got {said!r}") from error

    def close(self) -> None:
        """End the process that computes outputs."""
        self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        """The device answers; one that did before and is lost is waited for.

        Raises:
            TargetError: it does not.
        """
        state = self._adb("load", "get-state")
        if state.stdout.strip() != "device" and self._reached:
            with contextlib.suppress(StageError):
                self._adb("load", "wait-for-device", timeout_s=self._return_s)
            state = self._adb("load", "get-state")
        if state.stdout.strip() != "device":
            why = (state.stderr or state.stdout).strip()
            raise TargetError(f"{self._where}: the device is not there: {why}. `adb devices` lists those that are")
        self._reached = True

    def _file(self, artifact: Runnable) -> Artifact:
        if isinstance(artifact, Cascade):
            said = "a cascade cannot be measured by adb: benchmark_model runs one file on inputs of its own"
            raise TargetError(f"{self._where}: {said}; pick one point instead")
        return artifact

    def _bench(self) -> str:
        """Path of the tool on the device."""
        given = self._profile.options.get("benchmark_model")
        if given is not None:
            return str(given)
        path = os.environ.get(TOOL_VARIABLE)
        if path is None or not Path(path).is_file():
            raise TargetError(
                f"{self._where}: there is no benchmark_model to measure with: set {TOOL_VARIABLE} to the "
                f"TensorFlow Lite tool built for the device, or option `benchmark_model` to its path there; got {path}"
            )
        return self._taken(Path(path), sha256_of(Path(path)), ".bin")

    def _taken(self, path: Path, digest: str, suffix: str = ".tflite") -> str:
        """Path on the device of a file that is copied once; those used longest ago go."""
        there = f"{ROOT}/{digest}{suffix}"
        if not path.is_file():
            raise StageError("load", f"there is no file {path}: it was moved or removed since it was written")
        size = f"[ -f {there} ] && touch {there} && stat -c %s {there}"
        if self._shell("load", f"mkdir -p {ROOT}; {size} || true").strip() == str(path.stat().st_size):
            return there
        part = f"{there}.{os.getpid()}"
        self._checked("load", self._adb("load", "push", str(path.absolute()), part))
        if self._shell("load", f"sha256sum {part}").split()[0] != digest:
            raise StageError("load", f"{self._where}: {path} is damaged: its SHA-256 is not {digest}")
        old = f"ls -t {ROOT}/*.tflite | tail -n +{KEPT_MODELS + 1} | xargs rm -f"
        self._shell("load", f"chmod 755 {part} && mv {part} {there} && {old}")
        return there

    def _told(self, tool: str, path: str, pattern: re.Pattern[str]) -> float:
        """The number that the tool tells of a file; the device measures nothing else meanwhile."""
        plan, mask = self._profile.measure, self._profile.options.get("taskset")
        command = [*(["taskset", str(mask)] if mask is not None else []), tool, f"--graph={path}"]
        command += [f"--num_threads={plan.threads}", "--use_xnnpack=true"]
        command += [f"--warmup_runs={plan.warmup_runs}", f"--warmup_min_secs={plan.warmup_s:g}"]
        command += ["--num_runs=1", f"--min_secs={plan.turn_s:g}"]
        # A descriptor of the group and not of `exec`: Android's shell, mksh, keeps those of `exec` to itself.
        # What hangs is ended there, or it would hold the lock: a shell there need not end with its adb.
        limited = ["timeout", "-s", "KILL", str(math.ceil(plan.timeout_s)), *command]
        script = f"( flock -n 9 || exit {BUSY}; exec {shlex.join(limited)} ) 9>{ROOT}/lock"
        while (ended := self._adb("measure", "shell", script, timeout_s=plan.timeout_s + GRACE_S)).returncode == BUSY:
            time.sleep(BUSY_S)
        if ended.returncode in KILLED:
            raise StageError("measure", f"{self._where}: benchmark_model did not end within {plan.timeout_s:g} s")
        said = self._checked("measure", ended)
        found = pattern.search(said)
        if found is None or not math.isfinite(value := float(found[1])):
            raise StageError("measure", f"{self._where}: benchmark_model tells no figure: {_end(said)}")
        return value

    def _shell(self, stage: str, script: str) -> str:
        return self._checked(stage, self._adb(stage, "shell", script))

    def _checked(self, stage: str, done: "subprocess.CompletedProcess[str]") -> str:
        said = f"{done.stdout}\n{done.stderr}"
        if done.returncode:
            raise StageError(stage, f"{self._where}: adb ended with exit code {done.returncode}: {_end(said)}")
        return said.strip()

    def _adb(self, stage: str, *arguments: str, timeout_s: float | None = None) -> "subprocess.CompletedProcess[str]":
        timeout_s = timeout_s or self._profile.measure.timeout_s
        try:
            return subprocess.run(
                ["adb", "-s", self._serial, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except FileNotFoundError as error:
            raise TargetError(
                "adb is not installed: install Android's platform tools (Debian: apt install adb)"
            ) from error
        except subprocess.TimeoutExpired as error:
            said = f"adb {arguments[0]} gave no answer within {timeout_s:g} s"
            raise StageError(stage, f"{self._where}: {said}") from error


def _end(said: str) -> str:
    return " | ".join(said.strip().splitlines()[-5:])

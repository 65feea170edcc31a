"""Where measuring happens: this machine, in a process of its own that a crash, a hang or a leak cannot take us with."""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from autocompress.core.artifact import Artifact
from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.core.record import from_json, to_json


class Host(Protocol):
    """A device. `artifacts` have absolute paths; `inputs` is a folder with one `<input name>.npy` per input.

    A file that fails raises StageError with its stage, and the host is ready for the next one.
    """

    def measure(self, artifacts: Sequence[Artifact], inputs: Path, *, fresh: bool = False) -> list[Measurement]:
        """Latency of `artifacts[1:]` against `artifacts[0]`, all interleaved in one process."""

    def outputs(self, artifact: Artifact, inputs: Path, out: Path) -> None:
        """Run all items; write `out/<output name>.npy`."""

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        """Precision that really ran, by node name; None where the runtime does not tell."""

    def peak_memory(self, artifact: Artifact, inputs: Path) -> int:
        """Bytes that loading and running the file adds to a fresh process."""

    def energy(self, artifact: Artifact, inputs: Path) -> float | str:
        """Millijoules per inference, or why it is not known here."""

    def fingerprint(self) -> Fingerprint:
        """What the device and the runtime say of themselves."""


class LocalHost:
    """Measures on this machine in a persistent worker process, which starts on first use.

    A worker that crashed or hung is gone, the job's artifact has failed with StageError, and the next job starts
    another. Only one process of a user measures at a time: the others wait at a lock file.
    """

    def __init__(self, profile: Profile, *, environment: Mapping[str, str] | None = None) -> None:
        """A host for one profile; `environment` is added to the worker's."""
        threads = profile.options.get("threads", profile.measure.threads)
        if threads != profile.measure.threads:
            raise InputError(
                f"profile {profile.name}: `options.threads` is {threads} and `measure.threads` is "
                f"{profile.measure.threads}: say it in `measure.threads` only"
            )
        self._profile, self._environment = profile, dict(environment or {})
        self._worker: WorkerProcess | None = None

    def measure(self, artifacts: Sequence[Artifact], inputs: Path, *, fresh: bool = False) -> list[Measurement]:
        """Latency of `artifacts[1:]` against `artifacts[0]`, all interleaved in one process, item 0 as batch of one.

        Args:
            fresh: in a process that has done nothing before.
        """
        job = self._job("measure", artifacts, inputs) | {"plan": to_json(self._profile.measure)}
        with measuring_lock():
            result = self._in_fresh(job) if fresh else self._ask(job)
        blocks, found = result["blocks"], from_json(Fingerprint, result["fingerprint"])
        try:
            return [
                Measurement(
                    artifact_sha256=artifact.sha256,
                    reference_sha256=artifacts[0].sha256,
                    samples=tuple(tuple(block[i]) for block in blocks),
                    reference=tuple(tuple(block[0]) for block in blocks),
                    processes=(0,) * len(blocks),
                    clock=result["clock"],
                    plan=self._profile.measure,
                    fingerprint=found,
                )
                for i, artifact in enumerate(artifacts[1:], start=1)
            ]
        except InputError as error:  # a clock that stood still leaves a block without samples
            raise StageError("measure", f"the timing is unusable: {error}") from error

    def outputs(self, artifact: Artifact, inputs: Path, out: Path) -> None:
        """Run all items on all cores; write `out/<output name>.npy`, items along the first axis, all finite."""
        self._ask(self._job("outputs", [artifact], inputs) | {"out": str(out.absolute())})

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        """Precision that really ran, by node name; None where the runtime does not tell."""
        result = self._ask(self._job("executed", [artifact], inputs))
        return None if result is None else {str(k): str(v) for k, v in result.items()}

    def peak_memory(self, artifact: Artifact, inputs: Path) -> int:
        """Bytes that loading and running the file adds to a fresh process with the runtime imported, at the peak."""
        return int(self._in_fresh(self._job("memory", [artifact], inputs)))

    def energy(self, artifact: Artifact, inputs: Path) -> float | str:
        """Millijoules per inference of the processor packages, idle power included, or why it is not known here."""
        with measuring_lock():
            result = self._ask(self._job("energy", [artifact], inputs))
        return result if isinstance(result, str) else float(result)

    def fingerprint(self) -> Fingerprint:
        """What this machine and the runtime say of themselves.

        Raises:
            TargetError: the runtime is not usable here.
        """
        return from_json(Fingerprint, self._ask({"job": "fingerprint", "runtime": self._profile.runtime}))

    def close(self) -> None:
        """End the worker. The host may be used again."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _job(self, name: str, artifacts: Sequence[Artifact], inputs: Path) -> dict[str, Any]:
        return {
            "job": name,
            "runtime": self._profile.runtime,
            "options": {**self._profile.options, "threads": self._profile.measure.threads},
            "artifacts": [to_json(a) for a in artifacts],
            "inputs": str(inputs.absolute()),
        }

    def _start(self) -> "WorkerProcess":
        return WorkerProcess(self._environment, self._profile.measure.timeout_s)

    def _ask(self, job: Mapping[str, Any]) -> Any:
        if self._worker is not None and not self._worker.alive:  # killed for a failure, or gone while idle
            self.close()
        if self._worker is None:
            self._worker = self._start()
        return self._worker.ask(job)

    def _in_fresh(self, job: Mapping[str, Any]) -> Any:
        with contextlib.closing(self._start()) as worker:
            return worker.ask(job)


class WorkerProcess:
    """One process that runs `autocompress.device.worker`, in a session of its own: Ctrl-C does not reach it."""

    def __init__(self, environment: Mapping[str, str], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._buffer = b""
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        path = [environment.get("PYTHONPATH", ""), *(p or os.getcwd() for p in sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "autocompress.device.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            bufsize=0,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
            start_new_session=True,
        )
        self._heard = False

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    def ask(self, job: Mapping[str, Any]) -> Any:
        """The result of a job; whatever interrupts it, the process does not outlive a job that was not answered.

        Raises:
            StageError: the artifact failed, or the process crashed or was silent for too long on it.
            TargetError: the runtime is not usable here.
        """
        answered = False
        try:
            message = self._exchange(job)
            answered = True
        finally:
            if not answered:
                self.close()
        if "failure" not in message:
            return message["result"]
        failure = message["failure"]
        if failure["error"] == TargetError.__name__:
            raise TargetError(failure["message"])
        raise StageError(failure["stage"], failure["message"])

    def close(self) -> None:
        """End the process and what it started; doing so twice is harmless."""
        if self._words.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._words):
            if stream is not None:
                stream.close()

    def _exchange(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        stage = "load"
        with contextlib.suppress(BrokenPipeError):  # it has died: reading tells how
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        while True:
            line = self._line(stage)
            if line is None and not self._heard:
                raise TargetError(f"the worker process does not start: it {self._death()}{self._last_words()}")
            if line is None:
                raise StageError(stage, f"the worker process {self._death()} in stage {stage!r}{self._last_words()}")
            self._heard = True
            message: dict[str, Any] = json.loads(line)
            if "stage" not in message:
                return message
            stage = message["stage"]

    def _line(self, stage: str) -> bytes | None:
        """The next line, None at the end of the process."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                words = self._last_words()
                raise StageError(stage, f"the worker process hung in stage {stage!r} for {self._timeout_s:g} s{words}")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output and stayed"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _last_words(self) -> str:
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - 2000))
        lines = self._words.read().decode(errors="replace").strip().splitlines()[-5:]
        return f"; last on its stderr: {' | '.join(lines)}" if lines else ""


@contextlib.contextmanager
def measuring_lock() -> Iterator[None]:
    """Held while measuring: two measurements at once would disturb each other. Waits for its turn."""
    path = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

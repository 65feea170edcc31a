"""A worker process at the other end of a pipe, whatever starts it, and the host that hands it jobs."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from autocompress.core.artifact import Artifact
from autocompress.core.cascade import Runnable
from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.core.record import from_json, to_json

# A worker ends itself so long after its host must have given it up: for a host that has vanished.
GRACE_S = 10
# Exit code of ssh when the connection, and not what ran there, failed (ssh(1), EXIT STATUS).
CONNECTION_FAILED = 255


class WorkerProcess:
    """A command that speaks the worker's protocol, in a session of its own: Ctrl-C does not reach it.

    `where` names the device in every message, unless it is this machine.
    """

    def __init__(
        self, command: Sequence[str], timeout_s: float, *, environment: Mapping[str, str] | None = None, where: str = ""
    ) -> None:
        self._timeout_s, self._where = timeout_s, where
        self._buffer = b""
        self._heard = False
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                bufsize=0,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._words.close()
            raise TargetError(self._named(f"{command[0]} cannot be run: {error.strerror}")) from error
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    @property
    def cut_off(self) -> bool:
        """Whether it ended because its device was not reached, or was lost."""
        return bool(self._where) and self._process.poll() == CONNECTION_FAILED

    def ask(self, job: Mapping[str, Any]) -> Any:
        """The result of a job; whatever interrupts it, the process does not outlive a job that was not answered.

        Raises:
            StageError: the artifact failed, or the process crashed or was silent for too long on it.
            TargetError: the runtime is not usable there.
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
            raise TargetError(self._named(failure["message"]))
        raise StageError(failure["stage"], self._named(failure["message"]))

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
        stage = "load"
        with contextlib.suppress(BrokenPipeError):  # it has died: reading tells how
            self._send(json.dumps(job).encode() + b"\n", stage)
        while True:
            line = self._line(stage)
            if line is None:
                raise self._gone(stage)
            if not self._heard and not line.startswith(b"{"):
                continue  # what a login shell says before the worker does
            self._heard = True
            message: dict[str, Any] = json.loads(line)
            if "stage" not in message:
                return message
            stage = message["stage"]

    def _send(self, data: bytes, stage: str) -> None:
        assert self._process.stdin is not None
        deadline = time.monotonic() + self._timeout_s
        while data:
            self._await(self._process.stdin, select.POLLOUT, deadline, stage)
            data = data[os.write(self._process.stdin.fileno(), data[: 1 << 16]) :]

    def _line(self, stage: str) -> bytes | None:
        """The next line, None at the end of the process."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout_s
        while b"\n" not in self._buffer:
            self._await(self._process.stdout, select.POLLIN, deadline, stage)
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _await(self, stream: IO[bytes], event: int, deadline: float, stage: str) -> None:
        poll = select.poll()
        poll.register(stream, event)
        if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            said = f"the worker process hung in stage {stage!r} for {self._timeout_s:g} s{self._last_words()}"
            raise StageError(stage, self._named(said))

    def _gone(self, stage: str) -> StageError | TargetError:
        death, words = self._death(), self._last_words()
        if not self._heard:
            return TargetError(self._named(f"the worker process does not start: it {death}{words}"))
        return StageError(stage, self._named(f"the worker process {death} in stage {stage!r}{words}"))

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output and stayed"
        if self.cut_off:
            return "lost its connection"
        if self._where and code > 128:  # as a shell tells it
            code = 128 - code
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _last_words(self) -> str:
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - 2000))
        lines = self._words.read().decode(errors="replace").strip().splitlines()[-5:]
        return f"; last on its stderr: {' | '.join(lines)}" if lines else ""

    def _named(self, text: str) -> str:
        return f"{self._where}: {text}" if self._where else text


class WorkerHost:
    """Measures in a persistent worker process, which starts on first use.

    A worker that crashed or hung is gone, the job's artifact has failed with StageError, and the next job starts
    another. A kind of host says how a worker is started, and what it is handed where the disk is not shared.
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

    @property
    def reasons(self) -> Mapping[str, str]:
        """Nothing: all figures are the device's own."""
        return {}

    def measure(
        self, artifacts: Sequence[Runnable], inputs: Path, *, fresh: bool = False, rows: Sequence[int] = (0,)
    ) -> list[Measurement]:
        """Latency of `artifacts[1:]` against `artifacts[0]`, all interleaved in one process, as batches of one.

        Args:
            fresh: in a process that has done nothing before.
            rows: the items that are run, one after another, for a sample.
        """
        plan = self._profile.measure
        job = self._job("measure", artifacts, inputs) | {"plan": to_json(plan), "rows": list(rows)}
        result = self._in_fresh(job) if fresh else self._ask(job)
        found = from_json(Fingerprint, result["fingerprint"])
        return measurements(artifacts, result["blocks"], result["clock"], self._profile, found)

    def outputs(self, artifact: Runnable, inputs: Path, out: Path) -> None:
        """Run all items on all cores; write `out/<output name>.npy`, items along the first axis, all finite.

        Of a cascade, LARGE is among the outputs.
        """
        self._ask(self._job("outputs", [artifact], inputs) | {"out": str(out.absolute())})

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        """Precision that really ran, by node name; None where the runtime does not tell."""
        result = self._ask(self._job("executed", [artifact], inputs))
        return None if result is None else {str(k): str(v) for k, v in result.items()}

    def diagnose(self, artifact: Artifact, inputs: Path) -> dict[str, str]:
        """What the runtime noticed of how the file runs (see `TellsDiagnosis`); empty where it tells nothing."""
        return {str(k): str(v) for k, v in self._ask(self._job("diagnose", [artifact], inputs)).items()}

    def peak_memory(self, artifact: Runnable, inputs: Path) -> int:
        """Bytes that loading and running the file adds to a fresh process with the runtime imported, at the peak."""
        return int(self._in_fresh(self._job("memory", [artifact], inputs)))

    def energy(self, artifact: Artifact, inputs: Path) -> float | str:
        """Millijoules per inference of the processor packages, idle power included, or why it is not known here."""
        result = self._ask(self._job("energy", [artifact], inputs))
        return result if isinstance(result, str) else float(result)

    def fingerprint(self) -> Fingerprint:
        """What the device and the runtime say of themselves.

        Raises:
            TargetError: the runtime is not usable there.
        """
        job = {"job": "fingerprint", "runtime": self._profile.runtime, "options": dict(self._profile.options)}
        return from_json(Fingerprint, self._ask(job))

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

    def _start(self) -> WorkerProcess:
        """A new worker, ready for a job."""
        raise NotImplementedError

    def _do(self, worker: WorkerProcess, job: Mapping[str, Any]) -> Any:
        """The result of a job whose paths are ours."""
        return worker.ask(job)

    def _job(self, name: str, artifacts: Sequence[Runnable], inputs: Path) -> dict[str, Any]:
        return {
            "job": name,
            "runtime": self._profile.runtime,
            "options": {**self._profile.options, "threads": self._profile.measure.threads},
            "artifacts": [to_json(a) for a in artifacts],
            "inputs": str(inputs.absolute()),
            "limit_s": self._profile.measure.timeout_s + GRACE_S,
        }

    def _ask(self, job: Mapping[str, Any]) -> Any:
        if self._worker is not None and not self._worker.alive:  # killed for a failure, or gone while idle
            self.close()
        if self._worker is None:
            self._worker = self._start()
        return self._do(self._worker, job)

    def _in_fresh(self, job: Mapping[str, Any]) -> Any:
        with contextlib.closing(self._start()) as worker:
            return self._do(worker, job)


def measurements(
    artifacts: Sequence[Runnable], blocks: Any, clock: Any, profile: Profile, fingerprint: Fingerprint
) -> list[Measurement]:
    """The measurement of each of `artifacts[1:]` from blocks of samples, milliseconds, in the order of `artifacts`.

    Raises:
        StageError: a clock that stood still left a block without samples.
    """
    try:
        return [
            Measurement(
                artifact_sha256=artifact.sha256,
                reference_sha256=artifacts[0].sha256,
                samples=tuple(tuple(block[i]) for block in blocks),
                reference=tuple(tuple(block[0]) for block in blocks),
                processes=(0,) * len(blocks),
                clock=clock,
                plan=profile.measure,
                fingerprint=fingerprint,
            )
            for i, artifact in enumerate(artifacts[1:], start=1)
        ]
    except InputError as error:
        raise StageError("measure", f"the timing is unusable: {error}") from error

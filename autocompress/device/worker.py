"""The measuring process: `python -m autocompress.device.worker`, jobs in, results out, a line of JSON each.

A job is ``{"job": name, "runtime": …, "options": …, "plan": …, …}``. The answer is any number of
``{"stage": name}`` (where the work is now; each one shows that it is alive) and then one of ``{"result": …}`` and
``{"failure": {"stage", "error", "message"}}``. The process ends when its standard input does, even amid a job,
and where it cannot notice, because native code hangs, by the alarm of the job's ``limit_s``.
Standard output belongs to the protocol: what a runtime prints goes to standard error.
"""

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.cascade import Cascade, Runnable, files_of, runnable_from_json
from autocompress.core.errors import AutocompressError, StageError, TargetError
from autocompress.core.measurement import Fingerprint, MeasurePlan
from autocompress.core.record import from_json, to_json
from autocompress.device import files, meters
from autocompress.device.cascade import CascadeSession
from autocompress.device.fingerprint import Machine, fingerprint, usable_cores
from autocompress.device.inputs import Inputs
from autocompress.device.lock import measuring_lock
from autocompress.device.runtime import Array, Options, Runtime, Session, TellsDiagnosis, TellsFacts, get_runtime
from autocompress.device.timing import CLOCKS, clock_name, interleave

KEPT_SESSIONS = 4
MEMORY_RUNS = 5
ENERGY_S = 1.0
# A sample of several items is longer: so many times longer may they be measured, at most.
LONGEST = 10

Report = Callable[[str], None]


@dataclass(kw_only=True)
class Worker:
    """What stays between jobs: runtimes and sessions. `report` tells the other side the stage."""

    report: Report
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    sessions: OrderedDict[tuple[str, str], Session] = field(default_factory=OrderedDict)

    def answer(self, job: Mapping[str, Any]) -> Any:
        """The result of one job.

        Raises:
            StageError: the artifact failed.
            TargetError: the runtime is not usable here.
        """
        if job["job"] in files.JOBS:
            with self._stage("score" if job["job"] == "get" else "load"):
                return files.JOBS[job["job"]](job)
        runtime = self._runtime(job["runtime"])
        if job["job"] == "fingerprint":
            return self._fingerprint(job["runtime"], job["options"])
        options: Options = job["options"]
        artifacts = [runnable_from_json(a) for a in job["artifacts"]]
        with self._stage("load"):
            inputs = Inputs(Path(job["inputs"]), {spec.name: np.dtype(spec.dtype) for spec in artifacts[0].inputs})
        if job["job"] == "measure":
            plan = from_json(MeasurePlan, job["plan"])
            with measuring_lock(lambda: self.report("wait")):
                return self._measure(job["runtime"], artifacts, inputs, options, plan, job["rows"])
        if job["job"] == "executed":
            return self._executed(self._session(job["runtime"], artifacts[0], options), inputs)
        if job["job"] == "diagnose":
            return self._diagnose(self._session(job["runtime"], artifacts[0], options), inputs)
        if job["job"] == "outputs":
            return self._outputs(runtime, artifacts[0], inputs, Path(job["out"]), options)
        if job["job"] == "memory":
            return self._memory(job["runtime"], artifacts[0], inputs, options)
        if job["job"] == "energy":
            with measuring_lock(lambda: self.report("wait")):
                counter = meters.energy_counter(job["runtime"], options)
                return self._energy(self._session(job["runtime"], artifacts[0], options), inputs, counter)
        raise ValueError(f"no job {job['job']!r}")

    def _measure(
        self,
        runtime: str,
        artifacts: list[Runnable],
        inputs: Inputs,
        options: Options,
        plan: MeasurePlan,
        rows: list[int],
    ) -> dict[str, Any]:
        if emulator := Machine().emulator:
            raise TargetError(f"{emulator} plays the processor here: latency under emulation is no measurement")
        sessions = [self._session(runtime, a, options, keep=len(artifacts)) for a in artifacts]
        with self._stage("measure"):
            calls = [_bound(s, inputs, rows) for s in sessions]
            for artifact, call in zip(artifacts, calls, strict=True):
                _check_finite(call(), "measure", Path(artifact.path).name)
            clock = clock_name(plan)
            longer = dataclasses.replace(
                plan,
                warmup_runs=math.ceil(plan.warmup_runs / len(rows)),
                max_duration_s=plan.max_duration_s * min(len(rows), LONGEST),
            )
            blocks = [
                [[sample / len(rows) for sample in turn] for turn in block]
                for block in interleave(calls, longer, CLOCKS[clock])
            ]
        return {"clock": clock, "blocks": blocks, "fingerprint": self._fingerprint(runtime, options)}

    def _outputs(
        self, runtime: Runtime, artifact: Runnable, inputs: Inputs, out: Path, options: Options
    ) -> dict[str, list[int]]:
        batch = inputs.batch if artifact.dynamic_batch else 1
        starts = deque(range(0, inputs.count, batch))
        written: dict[str, Array] = {}
        lock = threading.Lock()

        def next_start() -> int | None:
            with lock:
                return starts.popleft() if starts else None

        def work(session: Session) -> None:
            try:
                while (start := next_start()) is not None:
                    run(session, start)
            finally:
                starts.clear()  # nothing is left, or this one failed: the others need not go on

        def run(session: Session, start: int) -> None:
            stop = min(start + batch, inputs.count)
            outputs = session.run(inputs.items(start, stop))
            _check_finite(outputs, "score", f"item {start}" if batch == 1 else f"items {start} to {stop - 1}")
            with lock:
                store(start, stop, outputs)

        def store(start: int, stop: int, outputs: Mapping[str, Array]) -> None:
            for name, value in outputs.items():
                if name not in written:
                    written[name] = _new_array(out / f"{name}.npy", value, inputs.count, stop - start)
                written[name][start:stop] = value
            self.report("score")

        # A session of one thread for each core: two threads within a session wait for each other longer.
        count = min(usable_cores(), len(starts))
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            load = [pool.submit(self._load, runtime, artifact, {**options, "threads": 1}) for _ in range(count)]
            sessions = [stack.enter_context(contextlib.closing(loaded.result())) for loaded in load]
            stack.enter_context(self._stage("score"))
            out.mkdir(parents=True, exist_ok=True)
            for done in [pool.submit(work, session) for session in sessions]:
                done.result()
            for array in written.values():
                array.flush()  # type: ignore[attr-defined]
        return {name: list(array.shape) for name, array in written.items()}

    def _executed(self, session: Session, inputs: Inputs) -> dict[str, str] | None:
        with self._stage("measure"):
            session.run(inputs.first)
            found = session.executed_precision()
        return None if found is None else dict(found)

    def _diagnose(self, session: Session, inputs: Inputs) -> dict[str, str]:
        if not isinstance(session, TellsDiagnosis):
            return {}
        with self._stage("measure"):
            session.run(inputs.first)
            return dict(session.diagnosis())

    def _memory(self, runtime: str, artifact: Runnable, inputs: Inputs, options: Options) -> int:
        if isinstance(artifact, Cascade):
            artifact = artifact.in_full
        verify(artifact)
        item = inputs.first
        added = meters.memory_added(runtime, options)
        session = self._load(self._runtime(runtime), artifact, options)
        with self._stage("memory"), contextlib.closing(session):
            for _ in range(MEMORY_RUNS):
                session.run(item)
            return max(1, added())

    def _energy(self, session: Session, inputs: Inputs, counter: meters.EnergyCounter | str) -> float | str:
        with self._stage("measure"):
            call = session.bind(inputs.first)

            def run() -> int:
                count, end = 0, time.perf_counter() + ENERGY_S
                while time.perf_counter() < end:
                    call()
                    count += 1
                return count

            return meters.energy_mj(run, counter)

    def _runtime(self, name: str) -> Runtime:
        if name not in self.runtimes:
            runtime = get_runtime(name)
            availability = runtime.available()
            if not availability.usable:
                raise TargetError(availability.reason)
            self.runtimes[name] = runtime
        return self.runtimes[name]

    def _session(self, runtime: str, artifact: Runnable, options: Options, keep: int = 0) -> Session:
        key = (artifact.key, json.dumps([runtime, dict(options)], sort_keys=True))
        if key not in self.sessions:
            verify(artifact)
            self.sessions[key] = self._load(self._runtime(runtime), artifact, options)
        self.sessions.move_to_end(key)
        while len(self.sessions) > max(keep, KEPT_SESSIONS):
            self.sessions.popitem(last=False)[1].close()
        return self.sessions[key]

    def _load(self, runtime: Runtime, artifact: Runnable, options: Options) -> Session:
        if isinstance(artifact, Cascade):
            small, large = (self._load(runtime, file, options) for file in files_of(artifact))
            return CascadeSession(small, large, artifact.rule)
        with self._stage("load"):
            return runtime.load(Path(artifact.path), {**options, **artifact.options})

    def _fingerprint(self, name: str, options: Options) -> Any:
        runtime = self._runtime(name)
        found = fingerprint(name, runtime.available().version or "unknown")
        device = runtime.facts(options) if isinstance(runtime, TellsFacts) else {}
        return to_json(Fingerprint(facts={**found.facts, **device}))

    @contextlib.contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        """Anything that goes wrong inside is a failure of that stage: a runtime may raise whatever it likes."""
        self.report(stage)
        try:
            yield
        except (StageError, TargetError):
            raise
        except Exception as error:
            text = str(error) if isinstance(error, AutocompressError) else f"{type(error).__name__}: {error}"
            raise StageError(stage, text) from error


def _bound(session: Session, inputs: Inputs, rows: list[int]) -> Callable[[], Mapping[str, Array]]:
    """A function that runs these items one after another and returns the last one's outputs."""
    calls = [session.bind(inputs.items(row, row + 1)) for row in rows]
    if len(calls) == 1:
        return calls[0]
    *others, last = calls

    def run() -> Mapping[str, Array]:
        for call in others:
            call()
        return last()

    return run


def verify(what: Runnable) -> None:
    """Raise StageError unless each file is there with the bytes that were written."""
    for artifact in files_of(what):
        _verify_file(artifact)


def _verify_file(artifact: Artifact) -> None:
    path = Path(artifact.path)
    if not path.is_file():
        raise StageError("load", f"there is no file {path}: it was moved or removed since it was written")
    size = path.stat().st_size
    if size != artifact.size_bytes:
        raise StageError("load", f"{path} is damaged: it has {size} bytes where {artifact.size_bytes} were written")
    if sha256_of(path) != artifact.sha256:
        raise StageError("load", f"{path} is damaged: its SHA-256 is not {artifact.sha256}")


def _check_finite(outputs: Mapping[str, Array], stage: str, where: str) -> None:
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise StageError(stage, f"output {name!r} is not finite for {where}")


def _new_array(path: Path, value: Array, count: int, batch: int) -> Array:
    if value.ndim == 0 or len(value) != batch:
        raise StageError("score", f"output {path.stem!r} must have one entry an item, got {value.shape} for {batch}")
    array: Array = np.lib.format.open_memmap(path, mode="w+", dtype=value.dtype, shape=(count, *value.shape[1:]))
    with path.open("r+b") as file:  # a full disk is said now: writing to a map of what is not there would be the end
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def serve(lines: TextIO, out: TextIO) -> None:
    """Answer jobs until there are none; one that shows nothing for its `limit_s` is the end of the process."""

    lock = threading.Lock()
    limit_s = 0

    def send(message: Mapping[str, Any]) -> None:
        with lock:
            signal.alarm(limit_s if "stage" in message else 0)
            out.write(json.dumps(message, allow_nan=False) + "\n")
            out.flush()

    worker = Worker(report=lambda stage: send({"stage": stage}))
    for line in lines:
        job = json.loads(line)
        limit_s = math.ceil(job.get("limit_s", 0))
        try:
            send({"result": worker.answer(job)})
        except (StageError, TargetError) as error:
            stage = error.stage if isinstance(error, StageError) else ""
            send({"failure": {"stage": stage, "error": type(error).__name__, "message": str(error)}})


def main() -> None:
    """Serve standard input and output; leave when the other side goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    serve(sys.stdin, out)


def _leave_with_parent() -> None:
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is always reported; input is not asked for
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    main()

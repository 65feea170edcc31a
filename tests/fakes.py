"""A runtime without a vendor: exact arithmetic, exact time, and every way to go wrong.

Its model file is JSON: `output = scale * input + shift`, with keys

- ``inputs``: name → [dtype, shape]; None in a shape is a free size
- ``scale``, ``shift``: of the first input
- ``work_ms``: time one run takes, on the injected clock, or of the processor where none is injected
- ``executed``: what `executed_precision` tells, or null
- ``misbehave``: {"load" or "run": how}; how is crash, exit, hang, raise, nan or print
- ``after``: runs that go well before

In a worker process it is ``tests.fakes:FakeRuntime``.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import InputError, StageError
from autocompress.device.runtime import Array, Availability, Options, check_inputs


class FakeClock:
    """A clock that moves only when it is told to, nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, duration_ns: int) -> None:
        self.now_ns += duration_ns


class FakeRuntime:
    """Loads the JSON described above."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self._clock = clock

    def available(self) -> Availability:
        return Availability(usable=True, version="1.0", reason="", install="pip install fake")

    def load(self, path: Path, options: Options) -> "FakeSession":
        if "threads" not in options:
            raise InputError("the option `threads` is missing")
        try:
            model = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise StageError("load", f"fake: {error}") from error
        misbehave(model, "load")
        return FakeSession(model, self._clock)


class UnusableRuntime(FakeRuntime):
    """A runtime whose package is not there."""

    def available(self) -> Availability:
        return Availability(usable=False, version=None, reason="fake is not installed", install="pip install fake")


class FakeSession:
    """One loaded fake."""

    def __init__(self, model: Mapping[str, Any], clock: FakeClock | None) -> None:
        self._model, self._clock, self._runs = model, clock, 0
        self._open = True
        self._inputs = {n: (np.dtype(dtype), tuple(shape)) for n, (dtype, shape) in model["inputs"].items()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.bind(inputs)()

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], dict[str, Array]]:
        if not self._open:
            raise InputError("the session is closed: load the file again")
        check_inputs(inputs, self._inputs)
        return lambda: self._run(inputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._runs += 1
        self._work()
        value = next(iter(inputs.values())) * self._model.get("scale", 1.0) + self._model.get("shift", 0.0)
        if self._runs > self._model.get("after", 0) and misbehave(self._model, "run") == "nan":
            value = value * np.nan
        return {"output": value.astype(np.float32)}

    def _work(self) -> None:
        duration_ns = round(self._model.get("work_ms", 0.0) * 1e6)
        if self._clock is not None:
            self._clock.advance(duration_ns)
            return
        end = time.process_time_ns() + duration_ns
        while time.process_time_ns() < end:
            pass

    def executed_precision(self) -> Mapping[str, str] | None:
        if not self._runs:
            raise InputError("what was executed is known only after a run")
        executed: Mapping[str, str] | None = self._model.get("executed")
        return executed

    def close(self) -> None:
        self._open = False


def misbehave(model: Mapping[str, Any], where: str) -> str | None:
    """Do what the model says goes wrong here; the name of it where it does not end things."""
    how: str | None = model.get("misbehave", {}).get(where)
    if how == "crash":
        print("fake: about to crash", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(7)
    if how == "hang":
        time.sleep(3600)
    if how == "raise":
        raise ZeroDivisionError("fake: went wrong")
    if how == "print":
        print("fake: chatting on standard output")
        os.write(1, b'{"result": "fake: chatting on file descriptor 1"}\n')
    return how

"""SIGINT and SIGTERM end a search cleanly: what is finished is kept."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress.run import Run


class Interrupted(KeyboardInterrupt):
    """A search was asked to stop by SIGINT or SIGTERM. Everything finished is kept; `run` is usable.

    A KeyboardInterrupt, so that no `except Exception` takes it for a candidate's fault.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}")
        self.run: Run | None = None


class Signals:
    """Turns the first SIGINT or SIGTERM into Interrupted; the second one does what it always does.

    Inside `deferred()` it waits until the block is left: a finished trial is written whole.
    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending: str | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator["Signals"]:
        """Handle signals in this block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, _: FrameType | None) -> None:
            for known, handler in previous.items():
                signal.signal(known, handler)
            self._pending = signal.Signals(number).name
            if not self._deferring:
                self._raise()

        for number in previous:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let this block finish first."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self._raise()

    def _raise(self) -> None:
        if self._pending is not None:
            name, self._pending = self._pending, None
            raise Interrupted(name)

"""The device's lock: two measurements at once would disturb each other, whoever takes them."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Not the directory of TMPDIR: processes with different ones share this device.
LOCK = Path("/tmp/autocompress.lock")  # noqa: S108 (opened without following links, and nothing is written to it)
RETRY_S = 0.05
REPORT_S = 1.0


@contextlib.contextmanager
def measuring_lock(waiting: Callable[[], None] | None = None, path: Path = LOCK) -> Iterator[None]:
    """Held while this device measures, one process of all its users at a time; the others wait for their turn.

    The kernel lets go of it with the process. `waiting` is called about once a second meanwhile.
    """
    descriptor = _open(path)
    try:
        reported = time.monotonic()
        while not _taken(descriptor):
            if waiting is not None and time.monotonic() - reported >= REPORT_S:
                waiting()
                reported = time.monotonic()
            time.sleep(RETRY_S)
        yield
    finally:
        os.close(descriptor)


def wait_until_quiet(path: Path = LOCK) -> None:
    """Return when nobody measures on this device: what would take the processor from a measurement waits for it."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A lock needs no more than reading, which another user's file in a sticky directory allows."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644))
    return os.open(path, flags)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

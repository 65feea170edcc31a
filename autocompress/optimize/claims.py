"""What the processes of one search are working on, so that no two do the same.

A claim is a small file that its process keeps locked. The kernel lets go of the lock with the process, so that what a
killed one was at is free again at once, and nothing has to be cleaned up.
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from autocompress.core.space import Choice, Values

ATTEMPTS, PAUSE_S = 3, 0.005


class Claims:
    """The claims of this process, and those of others, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, key: str, values: Values) -> bool:
        """Whether `key` is this process's now; False where another one that lives has it.

        Args:
            key: a name that a file may have.
            values: what is tried, for the others to see.
        """
        if key in self._own:
            return True
        path = self._folder / key
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not _locked(descriptor):
                os.close(descriptor)
                return False
            if _is(descriptor, path):
                break
            os.close(descriptor)  # its holder has just removed it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(dict(values)).encode(), 0)
        self._own[key] = descriptor
        return True

    def release(self, key: str) -> None:
        """Let go of a claim, if it is this process's."""
        descriptor = self._own.pop(key, None)
        if descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                (self._folder / key).unlink()
            os.close(descriptor)

    def of_others(self) -> dict[str, dict[str, Choice]]:
        """Keys that other processes hold now, with what they try."""
        found = {}
        for path in sorted(self._folder.iterdir()):
            if path.name in self._own or (values := _held(path)) is None:
                continue
            found[path.name] = values
        return found

    def close(self) -> None:
        """Let go of all."""
        for key in list(self._own):
            self.release(key)


def _locked(descriptor: int) -> bool:
    """Whether the lock is had now. Who only looks holds it for an instant, so that one refusal says nothing."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _held(path: Path) -> dict[str, Choice] | None:
    """What a claim says, None where nobody holds it; one that nobody holds is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            try:
                return dict(json.loads(text)) if text else {}
            except json.JSONDecodeError:  # being written
                return {}
        if _is(descriptor, path):
            path.unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)

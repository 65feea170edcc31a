"""Files that a host keeps on its device: jobs of the worker, for a device that does not share our disk.

Paths are relative to the worker's directory. A file comes in pieces and has its name only once it is whole.
"""

import base64
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autocompress.core.artifact import sha256_of
from autocompress.core.errors import StageError

PIECE = 2**20
# Models of a long search pile up: the ones used longest ago go first.
KEPT_BYTES = 4 * 2**30

Job = Mapping[str, Any]


def has(job: Job) -> bool:
    """Whether the file is there in its whole size; it counts as used now."""
    path = Path(job["path"])
    found = path.is_file() and path.stat().st_size == job["size"]
    if found:
        os.utime(path)
    return found


def put(job: Job) -> None:
    """One piece of a file, at its place."""
    part = _part(job["path"])
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("r+b" if job["at"] else "wb") as file:
            file.seek(job["at"])
            file.write(base64.b64decode(job["data"]))
    except OSError:  # a full disk is full for everyone: give back what is no use
        part.unlink(missing_ok=True)
        raise


def keep(job: Job) -> None:
    """The pieces are a file now, if their SHA-256 is the one announced."""
    part, path = _part(job["path"]), Path(job["path"])
    if sha256_of(part) != job["sha256"]:
        part.unlink()
        raise StageError("load", f"{job['name']} is damaged: its SHA-256 is not {job['sha256']}")
    part.replace(path)
    _make_room(path.parent)


def get(job: Job) -> str:
    """A piece of a file, empty past its end."""
    with Path(job["path"]).open("rb") as file:
        file.seek(job["at"])
        return base64.b64encode(file.read(PIECE)).decode("ascii")


def remove(job: Job) -> None:
    """The folder is gone."""
    shutil.rmtree(job["path"], ignore_errors=True)


JOBS: Mapping[str, Callable[[Job], Any]] = {"has": has, "put": put, "keep": keep, "get": get, "remove": remove}


def _part(path: str) -> Path:
    return Path(f"{path}.{os.getpid()}.part")


def _make_room(folder: Path) -> None:
    files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.iterdir() if p.is_file()), reverse=True)
    total = 0
    for _, size, path in files:
        total += size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)

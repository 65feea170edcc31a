"""Sent to a device as text and run by its own Python: makes the worker's environment there, then becomes the worker.

Standard library only, and no syntax that Python 3.8 does not know: this runs before anything is installed.
All it makes is under `~/.cache/autocompress`. It answers one job in the worker's protocol.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

INSTALL_S = 1200
STALE_S = 3600


def say(message: dict[str, Any]) -> None:
    """A line to the other side."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def unpack(archive: str) -> str:
    """The folder of our code, made on first use."""
    data = base64.b64decode(archive)
    place = os.path.join("code", hashlib.sha256(data).hexdigest()[:16])
    if not os.path.isdir(place):
        os.makedirs("code", exist_ok=True)
        scratch = tempfile.mkdtemp(dir="code")
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            file.extractall(scratch)
        try:
            os.rename(scratch, place)
        except OSError:  # another one was faster
            shutil.rmtree(scratch)
    return os.path.abspath(place)


def suitable() -> str:
    """A Python that our code runs on."""
    if sys.version_info >= (3, 11):  # noqa: UP036 (this file runs on older ones too)
        return sys.executable
    for minor in range(14, 10, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise RuntimeError(f"Python 3.11 or newer is needed there, found {sys.version.split()[0]} only")


def install(requirements: list[str]) -> str:
    """The Python of a virtual environment with what the worker needs, made on first use.

    It sees the system's packages: what is installed already is not fetched again.
    """
    python = suitable()
    key = hashlib.sha256(json.dumps([python, requirements]).encode()).hexdigest()[:16]
    place = os.path.abspath(os.path.join("venv", key))
    inside, ready = os.path.join(place, "bin", "python"), os.path.join(place, "ready")
    with open("install.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                say({"stage": "install"})
                time.sleep(1)
        if not os.path.exists(ready):
            shutil.rmtree(place, ignore_errors=True)
            run([python, "-m", "venv", "--system-site-packages", place])
            run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
            open(ready, "w").close()
    return inside


def run(command: list[str]) -> None:
    """Run a command, showing every second that it is alive."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        end = time.monotonic() + INSTALL_S
        try:
            while process.poll() is None and time.monotonic() < end:
                say({"stage": "install"})
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        finally:
            process.kill()
            code = process.wait()
        if code:
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"{' '.join(command)} failed: {' | '.join(said)}")


def main(terms: dict[str, Any]) -> None:
    """Answer the one job, and become the worker."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        os.makedirs(os.path.join(cache, "autocompress", "outputs"), exist_ok=True)
        os.chdir(os.path.join(cache, "autocompress"))
        for name in os.listdir("outputs"):  # of a connection that was cut
            if os.path.getmtime(os.path.join("outputs", name)) < time.time() - STALE_S:
                shutil.rmtree(os.path.join("outputs", name), ignore_errors=True)
        code = unpack(terms["code"])
        python = shutil.which(terms["python"]) if terms["python"] else install(terms["requirements"])
        if python is None:
            raise RuntimeError(f"there is no Python {terms['python']!r}")
    except Exception as error:  # whatever it is, the other side says it
        say({"failure": {"stage": "", "error": "TargetError", "message": f"{type(error).__name__}: {error}"}})
        return
    more = terms["environment"]
    path = os.pathsep.join(p for p in (more.get("PYTHONPATH"), code) if p)
    say({"result": python})
    os.execve(  # noqa: S606 (no shell)
        python, [python, "-P", "-m", "autocompress.device.worker"], {**os.environ, **more, "PYTHONPATH": path}
    )

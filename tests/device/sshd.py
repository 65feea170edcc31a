"""A real sshd on the loopback interface, with keys and configuration of its own, and an `ssh` that knows them."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from autocompress.device.ssh import PYTHON_VARIABLE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Sshd:
    """A running server. Its sessions have `home` as their home; what runs there sees our Python and our tests."""

    folder: Path
    port: int

    @property
    def name(self) -> str:
        """As `--on` takes it."""
        return f"ssh:{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def pid_file(self) -> Path:
        return self.folder / "sshd.pid"

    def start(self) -> None:
        """Listen; returns when a connection is taken."""
        subprocess.run([_sshd(), "-f", self.folder / "sshd_config"], check=True)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise RuntimeError("sshd does not listen")

    def stop(self) -> None:
        """Listen no more; connections stay."""
        with contextlib.suppress(OSError, ValueError):
            process = psutil.Process(int(self.pid_file.read_text()))
            process.terminate()
            process.wait(timeout=5)

    def connections(self) -> list[psutil.Process]:
        """The server's processes, one or two for each connection."""
        return psutil.Process(int(self.pid_file.read_text())).children(recursive=False)

    def workers(self) -> list[psutil.Process]:
        """Workers that run in this server's sessions."""
        found = psutil.Process(int(self.pid_file.read_text())).children(recursive=True)
        return [p for p in found if _command(p)[2:] == ["-m", "autocompress.device.worker"]]

    def cut(self) -> None:
        """End every connection, as a network does that goes away."""
        for process in self.connections():
            for child in (process, *process.children(recursive=False)):
                if "sshd" in child.name():
                    child.send_signal(signal.SIGKILL)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _sshd() -> str:
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "openssh-server"], check=False, capture_output=True)
        found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip("sshd is not installed: apt install openssh-server")
    return found


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, *, also_localhost: bool = False) -> Iterator[Sshd]:
    """A server with generated keys; PATH has its `ssh`, and the worker runs with this Python."""
    _sshd()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where the server's unprivileged part lives
    server = Sshd(folder=folder, port=_free_port())
    server.home.mkdir(parents=True)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    public = (folder / "host_key.pub").read_text().split()
    names = f"[127.0.0.1]:{server.port}" + (f",[localhost]:{server.port}" if also_localhost else "")
    (folder / "known_hosts").write_text(f"{names} {public[0]} {public[1]}\n")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {server.port}\nHostKey {folder}/host_key\nPidFile {server.pid_file}\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        f"SetEnv HOME={server.home} XDG_CACHE_HOME={server.home}/.cache PATH={os.environ['PATH']}\n"
    )
    (folder / "ssh_config").write_text(f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\n")
    programs = folder / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv(PYTHON_VARIABLE, sys.executable)
        try:
            yield server
        finally:
            server.cut()
            server.stop()

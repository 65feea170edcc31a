"""The device's lock, between processes and users."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from autocompress.device.lock import measuring_lock, wait_until_quiet


def test_only_one_process_measures_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "from pathlib import Path; from autocompress.device.lock import measuring_lock, wait_until_quiet\n"
        f"with measuring_lock(path=Path({str(path)!r})): print('mine', flush=True)"
    )
    with measuring_lock(path=path):
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1.5)
    assert other.communicate(timeout=30)[0] == "mine\n"


def test_waiting_is_told_and_ends(tmp_path: Path) -> None:
    told: list[int] = []
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with measuring_lock(path=tmp_path / "lock"):
            held.set()
            release.wait()

    def waiting() -> None:
        told.append(1)
        release.set()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with measuring_lock(waiting, tmp_path / "lock"):
        assert told == [1]
    holder.join()


def test_a_lock_is_no_way_to_write_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"), measuring_lock(path=tmp_path / "lock"):
        pass
    assert not (tmp_path / "target").exists()


def test_another_users_file_serves(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch(mode=0o444)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    with measuring_lock(path=path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_trains_waits_while_another_measures(tmp_path: Path) -> None:
    path, quiet = tmp_path / "lock", threading.Event()

    def train() -> None:
        wait_until_quiet(path)
        quiet.set()

    with measuring_lock(path=path):
        trainer = threading.Thread(target=train)
        trainer.start()
        assert not quiet.wait(0.5)
    assert quiet.wait(10)
    trainer.join()

"""An aarch64 machine by user-mode emulation: Debian's packages and wheels in a folder; nothing is installed.

`python -m tests.device.aarch64 FOLDER` makes one, and prints the command that runs Python in it.
"""

import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("apt-get", "dpkg-deb")
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
WHEELS = ("ai-edge-litert", "numpy", "psutil")

# What a Raspberry Pi 5 says. Without it, ai-edge-litert 2.2 and 2.3 crash when an interpreter is made: qemu 7.2 shows
# the /proc/cpuinfo of the machine below, and their library for processors does not know itself in it.
CORE = """BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
# A Raspberry Pi 5's core. With qemu 7.2's own choice (max) XNNPACK takes kernels for newer instructions, and an int8
# convolution comes out wrong.
CPU = "cortex-a76"


class MissingError(Exception):
    """A tool, a package or a wheel that is not to be had here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aarch64:
    """How a Python of that machine is run, and where its packages are."""

    command: tuple[str, ...]
    site: Path


def make(folder: Path) -> Aarch64:
    """Lay the machine out in `folder`.

    Raises:
        MissingError: what is needed is not here, and cannot be fetched.
    """
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise MissingError(f"an aarch64 machine is laid out with {' and '.join(missing)}: Debian's tools are needed")
    root, site = folder / "root", folder / "site"
    _unpack_debian(folder, root)
    emulator = shutil.which("qemu-aarch64-static") or str(_fetch_emulator(folder))
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text("\n".join(f"processor\t: {i}\n{CORE}" for i in range(4)), encoding="ascii")
    python = next(root.glob("usr/bin/python3.*[0-9]"))
    _unpack_wheels(folder / "wheels", site, python.name.removeprefix("python"))
    return Aarch64(command=(emulator, "-cpu", CPU, "-L", str(root), str(python)), site=site)


def _unpack_debian(folder: Path, root: Path) -> None:
    """The packages of this machine's own Debian release, for arm64, with what they need."""
    state, cache = folder / "apt/state", folder / "apt/cache"
    for place in (state / "lists/partial", cache / "archives/partial", root):
        place.mkdir(parents=True, exist_ok=True)
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "", "Debug::NoLocking": "1",
        "Dir::State": state, "Dir::State::status": "/dev/null", "Dir::Cache": cache,
    }  # fmt: skip
    apt = ["apt-get", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    _run([*apt, "update"])
    _run([*apt, "install", "--download-only", "--no-install-recommends", "-y", *PACKAGES])
    for package in cache.glob("archives/*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(root)])


def _fetch_emulator(folder: Path) -> Path:
    _run(["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", "qemu-user-static"], folder)
    (package,) = folder.glob("qemu-user-static_*.deb")
    _run(["dpkg-deb", "-x", str(package), str(folder / "qemu")])
    return folder / "qemu/usr/bin/qemu-aarch64-static"


def _unpack_wheels(wheels: Path, site: Path, version: str) -> None:
    tags = [word for glibc in ("2014", "_2_27", "_2_28") for word in ("--platform", f"manylinux{glibc}_aarch64")]
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run([*pip, "--only-binary", ":all:", *tags, "--python-version", version, "-c", str(constraints), "-d", str(wheels),
          *WHEELS])  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise MissingError(f"{shlex.join(command[:2])} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


if __name__ == "__main__":
    made = make(Path(sys.argv[1]).absolute())
    print(shlex.join(["env", f"PYTHONPATH={made.site}", *made.command]))

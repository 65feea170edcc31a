"""Where measuring happens: what every host does, and which one a name means."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from autocompress.core.artifact import Artifact
from autocompress.core.cascade import Runnable
from autocompress.core.errors import InputError
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.profile import Profile
from autocompress.device.adb import AdbHost
from autocompress.device.local import LocalHost
from autocompress.device.ssh import SshHost

LOCAL = "local"
# A name never begins with a dash, which would make it an option, and holds nothing that a shell would act on.
_SSH = re.compile(r"ssh:(?P<user_host>\w[\w.-]*@\w[\w.-]*)(:(?P<port>\d{1,5}))?", re.ASCII)
_ADB = re.compile(r"adb:(?P<serial>\w[\w.:-]*)", re.ASCII)


class Host(Protocol):
    """A device. `artifacts` have absolute paths; `inputs` is a folder with one `<input name>.npy` per input.

    A file that fails raises StageError with its stage, and the host is ready for the next one; so does a device that
    is lost on the way, named in the message. A device that measures for one waits with the others.
    """

    @property
    def reasons(self) -> Mapping[str, str]:
        """What of a score is not of the device itself, by the name of the figure, and why."""

    def measure(
        self, artifacts: Sequence[Runnable], inputs: Path, *, fresh: bool = False, rows: Sequence[int] = (0,)
    ) -> list[Measurement]:
        """Latency of `artifacts[1:]` against `artifacts[0]`, all interleaved in one process, over these items."""

    def outputs(self, artifact: Runnable, inputs: Path, out: Path) -> None:
        """Run all items; write `out/<output name>.npy`."""

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        """Precision that really ran, by node name; None where the runtime does not tell."""

    def diagnose(self, artifact: Artifact, inputs: Path) -> dict[str, str]:
        """What the runtime noticed of how the file runs; empty where it tells nothing."""

    def peak_memory(self, artifact: Runnable, inputs: Path) -> int:
        """Bytes that loading and running the file adds to a fresh process."""

    def energy(self, artifact: Artifact, inputs: Path) -> float | str:
        """Millijoules per inference, or why it is not known here."""

    def fingerprint(self) -> Fingerprint:
        """What the device and the runtime say of themselves."""


def parse_hosts(on: str) -> tuple[str, ...]:
    """The hosts of `local | ssh:user@host[:port] | adb:SERIAL`, one or several of a kind with commas between them.

    Raises:
        InputError: one of them is no host, or is named twice.
    """
    names = tuple(on.split(","))
    for name in names:
        found = _SSH.fullmatch(name)
        if name != LOCAL and not _ADB.fullmatch(name) and not (found and 0 < int(found["port"] or 22) < 2**16):
            raise InputError(f"a host is 'local', 'ssh:user@host[:port]' or 'adb:SERIAL', got {name!r}")
        if names.count(name) > 1:
            raise InputError(f"a device measures one thing at a time: name {name!r} once, got {on!r}")
    return names


def open_host(on: str, profile: Profile, environment: Mapping[str, str] | None = None) -> AbstractContextManager[Host]:
    """A host by its name, the first one of several; nothing is started or reached before its first job.

    Args:
        environment: added to the environment of its worker.

    Raises:
        InputError: it is no host.
    """
    name = parse_hosts(on)[0]
    if found := _SSH.fullmatch(name):
        port = int(found["port"]) if found["port"] else None
        return SshHost(found["user_host"], port, profile, environment=environment)
    if found := _ADB.fullmatch(name):
        return AdbHost(found["serial"], profile, environment=environment)
    return LocalHost(profile, environment=environment)

"""Memory and energy: read from the kernel, or not known and why."""

from collections.abc import Callable
from pathlib import Path

from autocompress.core.errors import StageError

_SELF = Path("/proc/self")
POWERCAP = Path("/sys/class/powercap")


def reset_peak_memory(proc: Path = _SELF) -> int:
    """Forget this process's high-water mark; its resident memory now, bytes.

    Called in a fresh process, after the runtime is imported and before the file is loaded: what is reported later
    is what the model adds to that. `ru_maxrss` would not do: it starts at the parent's size and cannot be reset.

    Raises:
        StageError: the kernel does not allow it; stage "memory".
    """
    try:
        (proc / "clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise StageError(
            "memory", f"{proc}/clear_refs cannot be written ({error.strerror}): peak memory needs Linux with it"
        ) from error
    return _status(proc, "VmRSS")


def peak_memory(proc: Path = _SELF) -> int:
    """High-water mark of this process's resident memory since the last reset, bytes."""
    return _status(proc, "VmHWM")


def _status(proc: Path, key: str) -> int:
    for line in (proc / "status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise StageError("memory", f"{proc}/status has no {key}: peak memory needs Linux with it")


def energy_reason(powercap: Path = POWERCAP) -> str | None:
    """Why energy is not known here, one sentence; None where RAPL counters can be read."""
    packages = _packages(powercap)
    if not packages:
        return f"no RAPL energy counter under {powercap}"
    try:
        for zone in packages:
            _counter(zone, "energy_uj")
    except OSError as error:
        return f"{error.filename} is not readable ({error.strerror}): reading it needs root on most systems"
    return None


def energy_mj(run: Callable[[], int], powercap: Path = POWERCAP) -> float | str:
    """Energy of the processor packages per inference while `run` runs, idle power included, in millijoules.

    Args:
        run: runs inferences for a second or so, and returns how many.

    Returns:
        The energy, or one sentence why it is not known here.
    """
    reason = energy_reason(powercap)
    if reason is not None:
        return reason
    packages = _packages(powercap)
    before = [_counter(zone, "energy_uj") for zone in packages]
    inferences = run()
    after = [_counter(zone, "energy_uj") for zone in packages]
    ranges = [_counter(zone, "max_energy_range_uj") for zone in packages]
    used = sum((b - a) % r for a, b, r in zip(before, after, ranges, strict=True))
    if used == 0:
        return f"the RAPL energy counter under {powercap} does not move"
    return used / 1000 / inferences


def _packages(powercap: Path) -> list[Path]:
    return [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]


def _counter(zone: Path, name: str) -> int:
    return int((zone / name).read_text(encoding="ascii"))

"""Memory and energy: read from the kernel, or not known and why."""

from collections.abc import Callable
from pathlib import Path

from autocompress.core.errors import StageError, TargetError
from autocompress.device import cuda, nvml
from autocompress.device.runtime import Options

# Millijoules since some moment; never less than at the call before.
EnergyCounter = Callable[[], float]

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


def memory_added(runtime: str, options: Options) -> Callable[[], int]:
    """Start counting memory: what it gives later is the most that was added since, bytes.

    Of the GPU's where this runtime computes there (that of all its programs: nothing else may load meanwhile), of this
    process's elsewhere.

    Raises:
        StageError: there is nothing to read it from; stage "memory".
    """
    if _on_gpu(runtime, options):
        used = cuda.used_memory()
        return lambda: cuda.used_memory() - used
    before = reset_peak_memory()
    return lambda: peak_memory() - before


def _status(proc: Path, key: str) -> int:
    for line in (proc / "status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise StageError("memory", f"{proc}/status has no {key}: peak memory needs Linux with it")


def energy_counter(runtime: str, options: Options, powercap: Path = POWERCAP) -> EnergyCounter | str:
    """What counts the energy of the device that this runtime uses with these options, or why nothing does."""
    if _on_gpu(runtime, options):
        return _gpu_counter()
    if runtime == "openvino" and str(options.get("device", "CPU")).partition(".")[0] != "CPU":
        return f"RAPL counts the processor's packages, and nothing here counts OpenVINO's {options['device']} alone"
    return rapl_counter(powercap)


def _on_gpu(runtime: str, options: Options) -> bool:
    """Whether it is NVIDIA's GPU that this runtime computes on with these options."""
    return runtime == "tensorrt" or options.get("provider", "cpu") != "cpu"


def _gpu_counter() -> EnergyCounter | str:
    try:
        return nvml.energy_counter(cuda.bus_id())
    except (StageError, TargetError) as error:
        return str(error)


def rapl_counter(powercap: Path = POWERCAP) -> EnergyCounter | str:
    """Energy of all processor packages, idle power included, or one sentence why it cannot be read."""
    packages = _packages(powercap)
    if not packages:
        return f"no RAPL energy counter under {powercap}"
    try:
        ranges = [_counter(zone, "max_energy_range_uj") for zone in packages]
        last = [_counter(zone, "energy_uj") for zone in packages]
    except OSError as error:
        return f"{error.filename} is not readable ({error.strerror}): reading it needs root on most systems"
    used_uj = 0

    def read() -> float:
        nonlocal used_uj, last
        now = [_counter(zone, "energy_uj") for zone in packages]
        used_uj += sum((b - a) % r for a, b, r in zip(last, now, ranges, strict=True))
        last = now
        return used_uj / 1000

    return read


def energy_mj(run: Callable[[], int], counter: EnergyCounter | str) -> float | str:
    """Energy per inference while `run` runs, in millijoules.

    Args:
        run: runs inferences for a second or so, and returns how many.
        counter: what counts, or why nothing does.

    Returns:
        The energy, or one sentence why it is not known here.
    """
    if isinstance(counter, str):
        return counter
    before = counter()
    inferences = run()
    used = counter() - before
    return used / inferences if used > 0 else "the energy counter does not move"


def _packages(powercap: Path) -> list[Path]:
    return [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]


def _counter(zone: Path, name: str) -> int:
    return int((zone / name).read_text(encoding="ascii"))

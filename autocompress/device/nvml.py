"""What NVIDIA's management library tells of a GPU: energy, clocks, and what disturbs measuring.

A GPU is named by its address on the PCI bus: CUDA's numbers are others where CUDA_VISIBLE_DEVICES is set.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from autocompress.core.errors import TargetError
from autocompress.core.extras import require

# Reasons for a clock that is not the GPU's own choice (nvmlClocksEventReasons), and what each says.
_SLOWED = {
    "nvmlClocksEventReasonSwPowerCap": "its power limit",
    "nvmlClocksEventReasonHwSlowdown": "a hardware slow-down",
    "nvmlClocksEventReasonHwThermalSlowdown": "its temperature",
    "nvmlClocksEventReasonSwThermalSlowdown": "its temperature",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "a power brake",
}


def facts(bus: str) -> dict[str, str]:
    """Driver, power limit and top clock; nothing where NVML does not tell."""
    found: dict[str, str] = {}
    with contextlib.suppress(TargetError), _gpu(bus) as (nvml, gpu):
        with contextlib.suppress(nvml.NVMLError):  # each by itself: a Jetson knows some of them only
            found["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        with contextlib.suppress(nvml.NVMLError):
            found["power_limit"] = f"{nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000:g} W"
        with contextlib.suppress(nvml.NVMLError):
            found["top_clock"] = f"{nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)} MHz"
    return found


def energy_counter(bus: str) -> Callable[[], float] | str:
    """Millijoules of the whole board since its driver was loaded, or one sentence why it is not known."""
    try:
        with _gpu(bus) as (nvml, gpu):
            nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except TargetError as error:
        return str(error)

    def count() -> float:
        with _gpu(bus) as (nvml, gpu):
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))

    return count


def disturbances(bus: str) -> list[str]:
    """What disturbs measuring on this GPU now, a sentence each; empty where nothing is seen."""
    found: list[str] = []
    with contextlib.suppress(TargetError), _gpu(bus) as (nvml, gpu):
        with contextlib.suppress(nvml.NVMLError):
            if busy := nvml.nvmlDeviceGetUtilizationRates(gpu).gpu:
                found.append(f"The GPU is {busy} % busy: other programs use it.")
        with contextlib.suppress(nvml.NVMLError):
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
            slowed = dict.fromkeys(why for name, why in _SLOWED.items() if reasons & getattr(nvml, name))
            if slowed:
                found.append(f"The GPU's clock is held down by {' and '.join(slowed)}: latencies move with it.")
    return found


@contextlib.contextmanager
def _gpu(bus: str) -> Iterator[tuple[Any, Any]]:
    """NVML and the handle of a GPU.

    Raises:
        TargetError: there is no NVML, no such GPU, or it does not tell what it is asked inside.
    """
    nvml = require("pynvml", "tensorrt")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise TargetError(f"NVML is not usable: {error}") from error
    try:
        yield nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus)
    except nvml.NVMLError as error:
        raise TargetError(f"NVML does not tell of GPU {bus}: {error}") from error
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value

import pytest

from autocompress.device import nvml
from tests.device.nvidia import BUS, Gpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch)


def test_without_its_library_the_real_module_gives_a_reason_and_no_facts() -> None:
    reason = nvml.energy_counter(BUS)
    if not isinstance(reason, str):
        pytest.skip("there is a GPU here")
    assert reason == "NVML is not usable: NVML Shared Library Not Found"
    assert nvml.facts(BUS) == {}
    assert nvml.disturbances(BUS) == []


def test_energy_counts_on(gpu: Gpu) -> None:
    count = nvml.energy_counter(BUS)
    assert not isinstance(count, str)
    assert count() == 1000
    gpu.energy_mj = 1500
    assert count() == 1500


def test_a_gpu_that_does_not_count_is_a_reason(gpu: Gpu) -> None:
    gpu.nvml_fails.add("nvmlDeviceGetTotalEnergyConsumption")
    assert nvml.energy_counter(BUS) == f"NVML does not tell of GPU {BUS}: Not Supported"


def test_facts_are_those_it_tells(gpu: Gpu) -> None:
    gpu.nvml_fails.add("nvmlDeviceGetEnforcedPowerLimit")
    assert nvml.facts(BUS) == {"driver": "999.1", "top_clock": "2100 MHz"}


@pytest.mark.parametrize(
    ("reasons", "utilization", "said"),
    [
        (0, 0, []),
        (1, 0, []),  # idle
        (4, 0, ["The GPU's clock is held down by its power limit: latencies move with it."]),
        (
            32 + 64 + 8,
            0,
            ["The GPU's clock is held down by a hardware slow-down and its temperature: latencies move with it."],
        ),
        (0, 40, ["The GPU is 40 % busy: other programs use it."]),
    ],
)
def test_what_disturbs_is_said(gpu: Gpu, reasons: int, utilization: int, said: list[str]) -> None:
    gpu.clock_reasons, gpu.utilization = reasons, utilization
    assert nvml.disturbances(BUS) == said

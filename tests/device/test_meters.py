"""Memory and energy."""

import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.core.errors import StageError
from autocompress.device import cuda
from autocompress.device.meters import (
    energy_counter,
    energy_mj,
    memory_added,
    peak_memory,
    rapl_counter,
    reset_peak_memory,
)
from tests.device.nvidia import install

MB = 1_000_000


def write_zone(folder: Path, name: str, energy_uj: int, limit: int = 10**9) -> Path:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone


def test_peak_is_what_is_touched_after_the_reset_even_when_it_is_free_again() -> None:
    script = (
        "from autocompress.device.meters import *\n"
        "import mmap\n"
        "def touch(size):\n"
        "    with mmap.mmap(-1, size) as m:\n"
        "        for i in range(0, size, 4096): m[i] = 1\n"
        "touch(300_000_000)\n"
        "before = reset_peak_memory()\n"
        "touch(100_000_000)\n"
        "print(peak_memory() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert 99 * MB < int(done.stdout) < 105 * MB


def test_peak_is_never_below_what_is_resident() -> None:
    before = reset_peak_memory()
    assert peak_memory() >= before > 1 * MB


def test_memory_without_the_kernel_interface_fails_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="clear_refs cannot be written") as caught:
        reset_peak_memory(tmp_path / "none")
    assert caught.value.stage == "memory"
    (tmp_path / "status").write_text("Name: x\n")
    with pytest.raises(StageError, match="has no VmHWM"):
        peak_memory(tmp_path)


def test_energy_is_that_of_all_packages_over_the_inferences(tmp_path: Path) -> None:
    one, two = write_zone(tmp_path, "intel-rapl:0", 5_000), write_zone(tmp_path, "intel-rapl:1", 999_999, 1_000_000)
    write_zone(tmp_path, "intel-rapl:0:0", 1)  # a part of package 0: counted there already

    def run() -> int:
        (one / "energy_uj").write_text("25000")
        (two / "energy_uj").write_text("9999")  # went over its range
        write_zone(tmp_path, "intel-rapl:0:0", 10**8)
        return 10

    assert energy_mj(run, rapl_counter(tmp_path)) == pytest.approx((20 + 10) / 10)


def test_a_counter_that_wraps_twice_still_counts(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", 0, 1000)
    read = rapl_counter(tmp_path)
    assert not isinstance(read, str)
    for _ in range(3):
        for value in (600, 300):
            (zone / "energy_uj").write_text(str(value))
            read()
    assert read() == pytest.approx((600 + 700 + 300 + 700 + 300 + 700) / 1000)


def test_energy_without_a_counter_is_a_reason(tmp_path: Path) -> None:
    assert energy_mj(lambda: 1, rapl_counter(tmp_path)) == f"no RAPL energy counter under {tmp_path}"


def test_energy_of_a_counter_that_stands_still_is_a_reason(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", 5)
    assert "does not move" in str(energy_mj(lambda: 1, rapl_counter(tmp_path)))


def test_energy_that_may_not_be_read_is_a_reason(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", 5)
    (zone / "energy_uj").unlink()
    (zone / "energy_uj").mkdir()  # unreadable for root too
    assert "is not readable" in str(rapl_counter(tmp_path))


def test_memory_of_a_gpu_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install(monkeypatch)
    added = memory_added("tensorrt", {})
    cuda.Stream().buffer("x", 4096)
    assert added() == 4096
    gpu.status["cudaMemGetInfo"] = 35
    with pytest.raises(StageError, match="cudaMemGetInfo fails") as caught:
        memory_added("onnxruntime", {"provider": "cuda"})
    assert caught.value.stage == "memory"


def test_memory_elsewhere_is_the_processs() -> None:
    added = memory_added("onnxruntime", {})
    held = bytearray(50 * MB)
    assert 49 * MB < added() < 100 * MB
    assert len(held) == 50 * MB


def test_packages_are_not_taken_for_another_device(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", 5)
    assert "OpenVINO's GPU.1 alone" in str(energy_counter("openvino", {"device": "GPU.1"}, tmp_path))
    for runtime, options in (("tensorrt", {}), ("onnxruntime", {"provider": "cuda"})):
        assert isinstance(energy_counter(runtime, options, tmp_path), str)
    for runtime, options in (("openvino", {"device": "CPU"}), ("openvino", {}), ("onnxruntime", {})):
        assert callable(energy_counter(runtime, options, tmp_path))

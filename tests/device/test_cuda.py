from pathlib import Path

import numpy as np
import pytest

from autocompress.core.errors import StageError
from autocompress.device import cuda
from tests.device.nvidia import BUS, Gpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    return install(monkeypatch)


def test_without_a_driver_the_library_itself_says_so() -> None:
    """The real module, which imports everywhere."""
    if cuda.unusable() is None:
        pytest.skip("there is a CUDA device here")
    assert cuda.unusable() == "no CUDA device: CUDA driver version is insufficient for CUDA runtime version"
    with pytest.raises(StageError, match="cuda: cudaMalloc fails: CUDA driver version is insufficient") as caught:
        cuda.call("cudaMalloc", 8)
    assert caught.value.stage == "measure"


def test_what_is_uploaded_comes_back(gpu: Gpu) -> None:
    stream, x, y = cuda.Stream(), np.arange(6, dtype=np.int64), np.empty(6, np.int64)
    stream.buffer("a", x.nbytes)
    stream.upload("a", x)
    stream.download("a", y)
    stream.wait()
    np.testing.assert_array_equal(y, x)


def test_a_buffer_stays_until_a_larger_one_is_needed(gpu: Gpu) -> None:
    stream = cuda.Stream()
    first = stream.buffer("a", 16)
    assert stream.buffer("a", 8) == first
    assert stream.buffer("b", 16) != first
    stream.buffer("a", 1000)
    assert sorted(len(block) for block in gpu.memory.values()) == [16, 1000]
    stream.close()
    assert not gpu.memory


def test_the_device_is_known_by_its_address(gpu: Gpu) -> None:
    assert cuda.bus_id() == BUS


def test_used_memory_is_what_is_not_free(gpu: Gpu) -> None:
    before = cuda.used_memory()
    cuda.Stream().buffer("a", 1000)
    assert cuda.used_memory() - before == 1000
    gpu.status["cudaMemGetInfo"] = 35
    with pytest.raises(StageError, match="cudaMemGetInfo fails: status 35") as caught:
        cuda.used_memory()
    assert caught.value.stage == "memory"

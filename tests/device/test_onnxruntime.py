"""ONNX Runtime's providers beside the processor, as far as they go without a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.device.onnxruntime import OnnxRuntime, _precisions
from tests.device.nvidia import install
from tests.models import write_linear

WITH_CUDA = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return write_linear(tmp_path / "linear.onnx", np.eye(4, 3, dtype=np.float32), np.ones(3, np.float32))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_installed_is_no_target_and_says_what_to_install(linear: Path, provider: str) -> None:
    runtime, options = OnnxRuntime(), {"provider": provider}
    for use in (lambda: runtime.load(linear, options), lambda: runtime.facts(options)):
        with pytest.raises(TargetError, match=r"this onnxruntime has no \w+: .* pip install onnxruntime-gpu"):
            use()


def test_a_provider_of_another_name_is_refused(linear: Path) -> None:
    with pytest.raises(InputError, match=r"Unknown `provider` of onnxruntime 'cude'\. Did you mean 'cuda'"):
        OnnxRuntime().load(linear, {"provider": "cude"})


def test_a_provider_that_does_not_start_is_not_replaced_in_silence(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime warns, and takes the processor."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: WITH_CUDA)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(StageError, match="CUDAExecutionProvider does not start") as caught,
    ):
        OnnxRuntime().load(linear, {"provider": "cuda"})
    assert caught.value.stage == "load"


def test_facts_are_of_the_gpu_where_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = install(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: WITH_CUDA)
    runtime = OnnxRuntime()
    assert runtime.facts({}) == runtime.facts({"provider": "cpu", "threads": 2}) == {}
    found = runtime.facts({"provider": "cuda"})
    assert (found["device"], found["provider"]) == ("Fake GPU", "cuda")
    gpu.status["cudaGetDeviceProperties"] = 35
    with pytest.raises(TargetError, match="cudaGetDeviceProperties fails"):
        runtime.facts({"provider": "cuda"})


def event(name: str, provider: str) -> dict[str, Any]:
    args = {"op_name": "Conv", "provider": provider, "input_type_shape": [{"float16": [1]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}


def test_a_node_that_fell_back_to_the_processor_says_so() -> None:
    events = [event("a", "CUDAExecutionProvider"), event("b", "CPUExecutionProvider")]
    assert _precisions(events, "CUDAExecutionProvider") == {"a": "fp16", "b": "fp16 on CPUExecutionProvider"}


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_outputs_on_a_gpu_equal_numpy(linear: Path, provider: str, tmp_path: Path) -> None:
    if f"{provider}executionprovider" not in [name.lower() for name in ort.get_available_providers()]:
        pytest.skip(f"onnxruntime: this installation has no {provider} provider")
    session = OnnxRuntime().load(linear, {"provider": provider, "cache_dir": str(tmp_path)})
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(session.run({"input": x})["output"], x[:, :3] + 1, rtol=1e-3)
    assert (session.executed_precision() is None) == (provider == "tensorrt")
    session.close()

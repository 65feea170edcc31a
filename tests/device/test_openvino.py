"""What OpenVINO alone promises, beside the contract of all runtimes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.device.local import LocalHost
from autocompress.device.openvino import OpenVino, OpenVinoSession, float_precisions
from autocompress.device.runtime import TellsFacts
from tests.device.conftest import profile_of
from tests.models import MIXED_PRECISIONS, write_convs, write_mixed

MIXED_X = {"input": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}
NAMES = {"bf16": "bf16", "f16": "fp16"}


def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    found = OpenVino().available()
    assert not found.usable
    assert "pip install 'autocompress[openvino]'" in found.reason
    with pytest.raises(TargetError, match="pip install"):
        OpenVino().load(write_mixed(tmp_path / "m.onnx"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 1}, r"Unknown option of openvino 'thread'\. Did you mean 'threads'\?"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
        ({"device": "AUTO"}, r"Unknown `device` of openvino 'AUTO'\. .*I know: CPU, GPU, NPU"),
        ({"inference_precision": "fp16"}, r"Unknown `inference_precision` of openvino 'fp16'\. Did you mean 'f16'\?"),
    ],
)
def test_wrong_option_is_named(tmp_path: Path, options: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OpenVino().load(write_mixed(tmp_path / "m.onnx"), options)


def test_device_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"OpenVINO sees no GPU\.7 here, only .*CPU"):
        OpenVino().load(write_mixed(tmp_path / "m.onnx"), {"device": "GPU.7"})
    with pytest.raises(TargetError, match=r"OpenVINO sees no GPU\.7 here"):
        OpenVino().facts({"device": "GPU.7"})


def test_facts_name_the_device_and_its_arithmetic() -> None:
    runtime = OpenVino()
    assert isinstance(runtime, TellsFacts)
    facts = runtime.facts({"threads": 1})
    assert facts["float_precisions"].split() == list(float_precisions())
    assert facts["float_precisions"].startswith("fp32")
    with LocalHost(profile_of("openvino")) as host:
        assert facts.items() <= host.fingerprint().facts.items()


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_arithmetic_that_the_processor_lacks_is_refused_and_what_it_has_runs(tmp_path: Path, precision: str) -> None:
    path = write_convs(tmp_path / "m.onnx", 2)
    options = {"threads": 1, "inference_precision": precision}
    if NAMES[precision] not in float_precisions():
        with pytest.raises(InputError, match=f"`inference_precision` {precision} is nothing that CPU here has: fp32"):
            OpenVino().load(path, options)
        return
    session = OpenVino().load(path, options)
    session.run({"input": np.zeros((1, 16, 16, 16), np.float32)})
    assert set((session.executed_precision() or {}).values()) == {NAMES[precision]}


def test_a_shape_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = OpenVino().load(write_mixed(tmp_path / "m.onnx"), {})
    for size in (1, 2, 1, 2, 1):
        session.run({"input": np.repeat(MIXED_X["input"], size, axis=0)})
    assert len(session._compiled) == 2


def test_model_from_the_cache_computes_the_same_and_says_what_ran(tmp_path: Path) -> None:
    path, options = write_mixed(tmp_path / "m.onnx"), {"threads": 1, "cache_dir": str(tmp_path / "cache")}
    sessions = [OpenVino().load(path, options) for _ in range(2)]
    outputs = [session.run(MIXED_X)["output"] for session in sessions]
    assert [from_cache(session) for session in sessions] == [False, True]
    np.testing.assert_array_equal(*outputs)
    assert [session.executed_precision() for session in sessions] == [MIXED_PRECISIONS] * 2


def from_cache(session: OpenVinoSession) -> bool:
    (compiled,) = session._compiled.values()
    return bool(compiled.get_property("LOADED_FROM_CACHE"))


def test_intermediate_representation_runs_like_the_onnx_file_it_was_made_of(tmp_path: Path) -> None:
    import openvino

    path = write_mixed(tmp_path / "m.onnx")
    openvino.save_model(openvino.Core().read_model(path), tmp_path / "m.xml", compress_to_fp16=False)
    sessions = [OpenVino().load(p, {"threads": 1}) for p in (path, tmp_path / "m.xml")]
    outputs = [session.run(MIXED_X) for session in sessions]
    np.testing.assert_allclose(outputs[1]["output"], outputs[0]["output"], rtol=1e-6)
    assert sessions[1].executed_precision() == MIXED_PRECISIONS


def test_caller_may_give_an_array_that_is_read_only_or_not_contiguous(tmp_path: Path) -> None:
    session = OpenVino().load(write_mixed(tmp_path / "m.onnx"), {})
    wanted = session.run(MIXED_X)["output"]
    x = np.asfortranarray(MIXED_X["input"])
    x.flags.writeable = False
    np.testing.assert_array_equal(session.run({"input": x})["output"], wanted)


def test_layer_that_is_called_like_an_input_or_makes_an_output_keeps_its_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    value, array = helper.make_tensor_value_info, onnx.numpy_helper.from_array
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"], name="tokens"),
        helper.make_node("ReduceMean", ["rows"], ["mean"], name="mean", axes=[1], keepdims=0),
        helper.make_node("Gemm", ["mean", "w", "b"], ["logits"], name="head", transB=1),
    ]
    weights = {"table": (20, 8), "w": (3, 8), "b": (3,)}
    graph = helper.make_graph(
        nodes,
        "g",
        [value("tokens", TensorProto.INT64, [None, 5])],
        [value("logits", TensorProto.FLOAT, [None, 3])],
        [array(rng.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    session = OpenVino().load(tmp_path / "m.onnx", {})
    assert list(session.run({"tokens": np.ones((2, 5), np.int64)})) == ["logits"]
    assert session.executed_precision() == {"tokens": "fp32", "head": "fp32"}


def test_what_cannot_be_compiled_for_a_shape_is_a_failure_to_load(tmp_path: Path) -> None:
    reshape = helper.make_node("Reshape", ["input", "shape"], ["output"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [reshape],
        "g",
        [value("input", TensorProto.FLOAT, [None])],
        [value("output", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "reshape.onnx")
    session = OpenVino().load(tmp_path / "reshape.onnx", {"threads": 1})
    assert session.run({"input": np.zeros(6, np.float32)})["output"].shape == (2, 3)
    with pytest.raises(StageError, match=r"^openvino: .*[Rr]eshape") as caught:
        session.run({"input": np.zeros(5, np.float32)})
    assert caught.value.stage == "load"


def test_there_is_one_core_for_the_process() -> None:
    """With its last one OpenVINO 2026.4 frees a stack for signals that is still set, and the next signal is the end."""
    from autocompress.device.openvino import _core

    assert _core() is _core()

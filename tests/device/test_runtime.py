"""The table of runtimes and what ONNX Runtime alone promises."""

from pathlib import Path

import numpy as np
import pytest

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.device.onnxruntime import OnnxRuntime
from autocompress.device.runtime import RUNTIMES, get_runtime
from tests.fakes import FakeRuntime
from tests.models import MIXED_PRECISIONS, write_mixed

EXTRAS = {"litert": "tflite"}
MIXED_X = {"input": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}


def test_every_runtime_of_the_table_can_be_made_and_says_whether_it_is_usable() -> None:
    for name in RUNTIMES:
        found = get_runtime(name).available()
        assert found.usable == (found.reason == "")
        assert f"autocompress[{EXTRAS.get(name, name)}]" in found.install


def test_a_runtime_of_ones_own_goes_by_module_and_class() -> None:
    assert isinstance(get_runtime("tests.fakes:FakeRuntime"), FakeRuntime)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onnxruntim", r"Unknown runtime 'onnxruntim'\. Did you mean 'onnxruntime'\? I know: litert, onnxruntime"),
        ("no.such:Thing", r"there is no module 'no\.such'"),
        ("tests.fakes:Nothing", r"module 'tests\.fakes' has no 'Nothing'"),
    ],
)
def test_unknown_runtime_says_what_is_known(name: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        get_runtime(name)


def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = OnnxRuntime().available()
    assert not found.usable
    assert found.version is None
    assert "pip install 'autocompress[onnxruntime]'" in found.reason
    with pytest.raises(TargetError, match="pip install"):
        OnnxRuntime().load(write_mixed(tmp_path / "m.onnx"), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 1}, r"Unknown option of onnxruntime 'thread'\. Did you mean 'threads'\?"),
        ({"optimization": "some"}, r"`optimization` of onnxruntime 'some'\. .*I know: all, none"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
    ],
)
def test_wrong_option_is_named(tmp_path: Path, options: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxRuntime().load(write_mixed(tmp_path / "m.onnx"), options)


@pytest.mark.parametrize(("optimization", "integer"), [("all", True), ("none", False)])
def test_without_optimization_nothing_runs_in_integers(tmp_path: Path, optimization: str, integer: bool) -> None:
    session = OnnxRuntime().load(write_mixed(tmp_path / "m.onnx"), {"optimization": optimization})
    session.run(MIXED_X)
    executed = session.executed_precision()
    assert executed.keys() == MIXED_PRECISIONS.keys()
    assert ("int8" in executed.values()) == integer


def test_optimized_integer_outputs_stay_close_to_unoptimized_ones(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.onnx")
    fast, plain = (OnnxRuntime().load(path, {"optimization": o}).run(MIXED_X)["output"] for o in ("all", "none"))
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-3)


def test_what_the_runtime_raises_while_running_is_a_failure_to_measure(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

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
    session = OnnxRuntime().load(tmp_path / "reshape.onnx", {"threads": 1})
    assert session.run({"input": np.zeros(6, np.float32)})["output"].shape == (2, 3)
    with pytest.raises(StageError, match=r"onnxruntime: .*Reshape") as caught:
        session.run({"input": np.zeros(5, np.float32)})
    assert caught.value.stage == "measure"


def test_executed_precision_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_mixed(tmp_path / "m.onnx")
    session = OnnxRuntime().load(path, {})
    session.run(MIXED_X)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    session.executed_precision()
    assert list((tmp_path / "here").iterdir()) == []

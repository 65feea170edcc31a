"""What LiteRT alone promises, beside the contract of all runtimes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.device import litert
from autocompress.device.litert import LiteRt, delegates
from autocompress.device.local import LocalHost
from autocompress.device.runtime import TellsDiagnosis, TellsFacts
from tests.device.conftest import profile_of
from tests.models import artifact_of, write_inputs
from tests.tflite_files import MIXED_PRECISIONS, Graph, write_convs, write_cut, write_linear, write_mixed

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def unprobed() -> Iterator[None]:
    """What was found out about the packages is forgotten, before and after."""
    litert._package.cache_clear()
    yield
    litert._package.cache_clear()


@pytest.mark.usefixtures("unprobed")
def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    found = LiteRt().available()
    assert not found.usable
    assert found.version is None
    assert "pip install 'autocompress[tflite]'" in found.reason
    with pytest.raises(TargetError, match="pip install"):
        LiteRt().load(write_convs(tmp_path / "m.tflite"), {})


class Interpreter:
    """Imports, and fails when it is made: tflite-runtime with numpy 2 does so."""

    def __init__(self, **how: Any) -> None:
        raise SystemError("CreateWrapperFromBuffer returned a result with an exception set")


def package(monkeypatch: pytest.MonkeyPatch, name: str, interpreter: type, version: str) -> None:
    parent, module = ModuleType(name), ModuleType(f"{name}.interpreter")
    vars(parent)["__version__"], vars(module)["Interpreter"] = version, interpreter
    monkeypatch.setitem(sys.modules, name, parent)
    monkeypatch.setitem(sys.modules, f"{name}.interpreter", module)


@pytest.mark.usefixtures("unprobed")
def test_package_that_imports_but_makes_no_interpreter_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    package(monkeypatch, "ai_edge_litert", Interpreter, "2.3.0")
    found = LiteRt().available()
    assert not found.usable
    assert found.reason.startswith("ai-edge-litert fails: CreateWrapperFromBuffer returned")


@pytest.mark.usefixtures("unprobed")
def test_former_package_is_taken_where_the_present_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_edge_litert.interpreter import Interpreter as Real

    package(monkeypatch, "ai_edge_litert", Interpreter, "2.3.0")
    package(monkeypatch, "tflite_runtime", Real, "2.14.0")
    found = LiteRt().available()
    assert found.usable
    assert found.version == "2.14.0 (tflite-runtime)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 1}, r"Unknown option of litert 'thread'\. Did you mean 'threads'\?"),
        ({"threads": 0}, "`threads` must be at least 1, got 0"),
    ],
)
def test_wrong_option_is_named(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LiteRt().load(write_convs(tmp_path / "m.tflite"), options)


@pytest.mark.parametrize(("xnnpack", "delegate"), [(True, "XNNPACK"), (False, "none")])
def test_facts_say_whose_kernels_run(xnnpack: bool, delegate: str) -> None:
    runtime = LiteRt()
    assert isinstance(runtime, TellsFacts)
    assert runtime.facts({"xnnpack": xnnpack, "threads": 1}) == {"delegate": delegate}


def test_xnnpack_computes_what_the_other_kernels_compute(tmp_path: Path) -> None:
    path = write_convs(tmp_path / "m.tflite")
    fast, plain = (LiteRt().load(path, {"xnnpack": on}).run({"input": X})["output"] for on in (True, False))
    np.testing.assert_allclose(fast, plain, rtol=1e-5, atol=1e-5)


def test_integer_kernels_do_not_overflow_with_weights_of_eight_bits(tmp_path: Path) -> None:
    """Which those of other runtimes do, without VNNI."""
    rng = np.random.default_rng(0)
    weight, x = rng.choice([-127.0, 127.0], size=(32, 64)), rng.choice([-1, 1], size=(1, 64)).astype(np.float32)
    graph = Graph()
    graph.tensor("x", (1, 64))
    graph.tensor("q", (1, 64), "int8", scale=1 / 127)
    graph.operator("QUANTIZE", ["x"], "q")
    graph.constant("w", weight, scale=1.0)
    graph.constant("b", np.zeros(32, np.int32), scale=1 / 127)
    graph.tensor("fc", (1, 32), "int8", scale=100.0)
    graph.operator("FULLY_CONNECTED", ["q", "w", "b"], "fc", "FullyConnected")
    graph.tensor("y", (1, 32))
    graph.operator("DEQUANTIZE", ["fc"], "y")
    path = graph.write(tmp_path / "m.tflite", {"input": "x"}, {"output": "y"})
    found = LiteRt().load(path, {}).run({"input": x})["output"]
    np.testing.assert_allclose(found, x @ weight.T, atol=100.0)


def test_what_runs_is_named_with_xnnpack_and_without(tmp_path: Path) -> None:
    for on in (True, False):
        session = LiteRt().load(write_mixed(tmp_path / "m.tflite"), {"xnnpack": on})
        session.run({"input": X})
        assert session.executed_precision() == MIXED_PRECISIONS


@pytest.mark.parametrize(("name", "whole", "without"), [("convs", 1, 0), ("mixed", 1, 0), ("cut", 2, 0)])
def test_pieces_of_the_graph_are_counted(tmp_path: Path, name: str, whole: int, without: int) -> None:
    path = {"convs": write_convs, "mixed": write_mixed, "cut": write_cut}[name](tmp_path / "m.tflite")
    assert delegates(LiteRt().load(path, {})) == whole
    assert delegates(LiteRt().load(path, {"xnnpack": False})) == without


def test_pieces_of_the_graph_come_through_the_worker(tmp_path: Path) -> None:
    path = write_cut(tmp_path / "m.tflite")
    assert isinstance(LiteRt().load(path, {}), TellsDiagnosis)
    inputs = write_inputs(tmp_path / "inputs", input=X)
    with LocalHost(profile_of("litert")) as host:
        assert host.diagnose(artifact_of(path), inputs) == {"delegates": "2"}


def test_sixteen_bit_activations_and_looked_up_tables_are_told_apart(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("tokens", (1, 3), "int32")
    graph.constant("table", np.ones((10, 4), np.float32))
    graph.tensor("rows", (1, 3, 4))
    graph.operator("GATHER", ["table", "tokens"], "rows", "Gather", axis=0)
    graph.tensor("q", (1, 3, 4), "int16", scale=0.001)
    graph.operator("QUANTIZE", ["rows"], "q")
    graph.constant("w", np.ones((2, 4), np.float32), scale=0.01)
    graph.tensor("fc", (1, 3, 2), "int16", scale=0.01)
    graph.operator("FULLY_CONNECTED", ["q", "w"], "fc", "FullyConnected", keepNumDims=True)
    graph.tensor("out", (1, 3, 2))
    graph.operator("DEQUANTIZE", ["fc"], "out")
    path = graph.write(tmp_path / "m.tflite", {"tokens": "tokens"}, {"logits": "out"})
    session = LiteRt().load(path, {})
    found = session.run({"tokens": np.ones((1, 3), np.int32)})
    np.testing.assert_allclose(found["logits"], np.full((1, 3, 2), 4.0), atol=0.02)
    assert session.executed_precision() == {"rows": "fp32", "fc": "int16"}


def test_outputs_come_in_the_models_order_and_names_in_the_signatures(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("a", (None, 2))
    graph.tensor("b", (None, 2))
    for kind, name in (("ADD", "sum"), ("SUB", "difference")):
        graph.tensor(name, (None, 2))
        graph.operator(kind, ["a", "b"], name)
    path = graph.write(tmp_path / "m.tflite", {"right": "b", "left": "a"}, {"second": "sum", "first": "difference"})
    left, right = np.full((3, 2), 5.0, np.float32), np.full((3, 2), 2.0, np.float32)
    found = LiteRt().load(path, {}).run({"left": left, "right": right})
    assert list(found) == ["second", "first"]
    np.testing.assert_array_equal(found["second"], left + right)
    np.testing.assert_array_equal(found["first"], left - right)


def test_file_without_a_signature_goes_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    path = write_linear(tmp_path / "m.tflite", np.eye(4, dtype=np.float32), np.ones(4, np.float32), signature=False)
    found = LiteRt().load(path, {}).run({"args_0": X[0, :2, :4, 0]})
    np.testing.assert_allclose(found["layers.0.fc"], X[0, :2, :4, 0] + 1)


def test_calls_of_other_batch_sizes_in_between_do_not_disturb(tmp_path: Path) -> None:
    session = LiteRt().load(write_convs(tmp_path / "m.tflite"), {})
    calls = {size: session.bind({"input": X[:size]}) for size in (1, 4, 2)}
    wanted = session.run({"input": X})["output"]
    for size in (1, 2, 4, 1):
        np.testing.assert_allclose(calls[size]()["output"], wanted[:size], rtol=1e-6)


def test_caller_may_give_an_array_that_is_read_only_or_not_contiguous(tmp_path: Path) -> None:
    session = LiteRt().load(write_convs(tmp_path / "m.tflite"), {})
    wanted = session.run({"input": X})["output"]
    x = np.asfortranarray(X)
    x.flags.writeable = False
    np.testing.assert_array_equal(session.run({"input": x})["output"], wanted)


def test_fixed_batch_takes_that_size_alone(tmp_path: Path) -> None:
    weight, bias = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    session = LiteRt().load(write_linear(tmp_path / "m.tflite", weight, bias, batch=1), {})
    with pytest.raises(InputError, match=r"'input' must have shape \(1, 4\), got \(2, 4\)"):
        session.run({"input": np.zeros((2, 4), np.float32)})


def test_size_that_the_model_does_not_take_is_a_failure_to_load_and_another_still_runs(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("x", (None, 2))
    graph.constant("shape", np.array([2, 3], np.int32))
    graph.tensor("y", (2, 3))
    graph.operator("RESHAPE", ["x", "shape"], "y", "Reshape", newShape=[2, 3])
    path = graph.write(tmp_path / "m.tflite", {"input": "x"}, {"output": "y"}, size=3)
    session = LiteRt().load(path, {})
    with pytest.raises(StageError, match=r"^litert: .*reshape") as caught:
        session.run({"input": np.zeros((2, 2), np.float32)})
    assert caught.value.stage == "load"
    assert session.run({"input": np.zeros((3, 2), np.float32)})["output"].shape == (2, 3)


def test_operator_that_the_runtime_lacks_is_a_failure_to_load(tmp_path: Path) -> None:
    graph = Graph()
    graph.tensor("x", (1, 2))
    graph.tensor("y", (1, 2))
    graph.operator("STABLEHLO_RNG_BIT_GENERATOR", ["x"], "y")
    path = graph.write(tmp_path / "m.tflite", {"input": "x"}, {"output": "y"})
    with pytest.raises(StageError, match=r"^litert: ") as caught:
        LiteRt().load(path, {})
    assert caught.value.stage == "load"

"""Every runtime keeps the promises of `autocompress.device.runtime`; one class, each runtime supplies a case."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autocompress.core.errors import InputError, StageError
from autocompress.device.onnxruntime import OnnxRuntime
from autocompress.device.runtime import Runtime, Session
from tests.fakes import FakeRuntime
from tests.models import MIXED_PRECISIONS, write_fake, write_linear, write_mixed

OPTIONS = {"threads": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A runtime, a model of it with its inputs and their outputs, and a model of mixed precision with what runs.

    The model's one input, "input", is float32 of shape (any, 4).
    """

    runtime: Runtime
    path: Path
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    mixed: Path
    mixed_inputs: Mapping[str, NDArray[Any]]
    executed: Mapping[str, str]


def _x() -> NDArray[Any]:
    return np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


def onnxruntime_case(folder: Path) -> Case:
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    return Case(
        runtime=OnnxRuntime(),
        path=write_linear(folder / "linear.onnx", weight, bias),
        inputs={"input": _x()},
        outputs={"output": _x() @ weight + bias},
        mixed=write_mixed(folder / "mixed.onnx"),
        mixed_inputs={"input": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)},
        executed=MIXED_PRECISIONS,
    )


def fake_case(folder: Path) -> Case:
    executed = {"a": "int8", "b": "fp32"}
    path = write_fake(folder / "fake.json", scale=2.0, shift=1.0, executed=executed)
    x = {"input": _x()}
    outputs = {"output": 2 * _x() + 1}
    return Case(
        runtime=FakeRuntime(), path=path, inputs=x, outputs=outputs, mixed=path, mixed_inputs=x, executed=executed
    )


CASES = {"onnxruntime": onnxruntime_case, "fake": fake_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


@pytest.fixture
def session(case: Case) -> Session:
    return case.runtime.load(case.path, OPTIONS)


class TestRuntime:
    def test_says_it_is_usable_with_a_version_and_how_to_install_it(self, case: Case) -> None:
        found = case.runtime.available()
        assert found.usable
        assert found.version
        assert found.reason == ""
        assert found.install.startswith("pip install")

    def test_outputs_equal_numpy(self, case: Case, session: Session) -> None:
        found = session.run(case.inputs)
        assert list(found) == list(case.outputs)
        for name, value in case.outputs.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)

    def test_runs_any_batch_size_where_the_batch_is_free(self, case: Case, session: Session) -> None:
        for size in (1, 3):
            found = session.run({"input": case.inputs["input"][:size]})
            np.testing.assert_allclose(found["output"], case.outputs["output"][:size], rtol=1e-5, atol=1e-6)

    def test_bound_call_gives_the_same_each_time_and_leaves_earlier_outputs_as_they_were(
        self, case: Case, session: Session
    ) -> None:
        call = session.bind(case.inputs)
        first = call()["output"]
        kept = first.copy()
        session.run({"input": case.inputs["input"] + 1})
        np.testing.assert_array_equal(call()["output"], kept)
        np.testing.assert_array_equal(first, kept)

    def test_closing_twice_is_harmless_and_a_run_after_it_says_so(self, case: Case, session: Session) -> None:
        session.close()
        session.close()
        with pytest.raises(InputError, match="closed"):
            session.run(case.inputs)

    def test_wrong_name_names_the_right_one(self, case: Case, session: Session) -> None:
        with pytest.raises(InputError, match=r"Unknown model input 'inputt'\. Did you mean 'input'\?"):
            session.run({"inputt": case.inputs["input"]})

    def test_missing_input_is_named(self, session: Session) -> None:
        with pytest.raises(InputError, match="model input 'input' is missing, got none"):
            session.run({})

    def test_wrong_shape_says_what_came_and_what_is_expected(self, case: Case, session: Session) -> None:
        with pytest.raises(InputError, match=r"'input' must have shape \(any, 4\), got \(5, 3\)"):
            session.run({"input": case.inputs["input"][:, :3]})
        with pytest.raises(InputError, match=r"'input' must have shape \(any, 4\), got \(4,\)"):
            session.run({"input": case.inputs["input"][0]})

    def test_wrong_dtype_says_what_came_and_what_is_expected(self, case: Case, session: Session) -> None:
        with pytest.raises(InputError, match="'input' must be float32, got float64"):
            session.run({"input": case.inputs["input"].astype(np.float64)})

    def test_executed_precision_names_what_ran_in_each_layer(self, case: Case) -> None:
        session = case.runtime.load(case.mixed, OPTIONS)
        session.run(case.mixed_inputs)
        assert session.executed_precision() == case.executed

    def test_executed_precision_needs_a_run_first(self, session: Session) -> None:
        with pytest.raises(InputError, match="only after a run"):
            session.executed_precision()

    def test_truncated_file_fails_to_load(self, case: Case, tmp_path: Path) -> None:
        content = case.path.read_bytes()
        for size in (0, len(content) // 2):
            path = tmp_path / "truncated"
            path.write_bytes(content[:size])
            with pytest.raises(StageError) as caught:
                case.runtime.load(path, OPTIONS)
            assert caught.value.stage == "load"

    def test_file_that_is_not_there_fails_to_load(self, case: Case, tmp_path: Path) -> None:
        with pytest.raises(StageError) as caught:
            case.runtime.load(tmp_path / "none", OPTIONS)
        assert caught.value.stage == "load"

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from autocompress.core.errors import StageError
from autocompress.export.parity import check_optimised, float_difference, run_onnx, sqnr_db


def model(*nodes: onnx.NodeProto) -> bytes:
    """A file from nodes that lead from `input` [batch, 4] to `output`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in ("input", "output")]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


FEEDS = {"input": np.arange(8, dtype=np.float32).reshape(2, 4)}


@pytest.mark.parametrize("optimise", [True, False])
def test_runs_a_file_from_its_bytes(optimise: bool) -> None:
    (got,) = run_onnx(model(helper.make_node("Neg", ["input"], ["output"])), FEEDS, optimise=optimise)
    np.testing.assert_array_equal(got, -FEEDS["input"])


@pytest.mark.parametrize(
    ("data", "feeds"),
    [(b"no model", FEEDS), (model(helper.make_node("Neg", ["input"], ["output"])), {"x": FEEDS["input"]})],
)
def test_what_does_not_run_fails_in_one_line(data: bytes, feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(StageError, match="ONNX Runtime fails on the exported graph: ") as caught:
        run_onnx(data, feeds)
    assert caught.value.stage == "export"
    assert "\n" not in str(caught.value)


def rounded_twice(coarse: float, fine: float) -> bytes:
    """Two pairs of Q and DQ in a row, which ONNX Runtime's optimisation makes one: whole steps are lost then."""
    nodes, value = [], "input"
    for scale, out in ((coarse, "middle"), (fine, "output")):
        constants = helper.make_node("Constant", [], [f"{out}_s"], value_float=scale)
        zero = helper.make_tensor("z", TensorProto.UINT8, [], [0])
        nodes += [constants, helper.make_node("Constant", [], [f"{out}_z"], value=zero)]
        nodes.append(helper.make_node("QuantizeLinear", [value, f"{out}_s", f"{out}_z"], [f"{out}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{out}_q", f"{out}_s", f"{out}_z"], [out]))
        value = out
    return model(*nodes)


def test_outputs_that_differ_with_optimisation_are_refused() -> None:
    feeds = {"input": np.full((2, 4), 0.4, np.float32)}
    with pytest.raises(StageError, match=r"optimised outputs disagree with its unoptimised ones: -?\d+\.\d dB"):
        check_optimised(rounded_twice(1.0, 0.01), feeds)
    assert check_optimised(rounded_twice(0.01, 0.01), feeds) > 30


@given(st.floats(0.1, 1e3), st.floats(1e-4, 1.0))
def test_difference_is_relative_to_the_largest_value(size: float, share: float) -> None:
    wanted = np.array([[size, -size / 2]], np.float32)
    got = wanted + np.float32([[0, size * share]])
    assert float_difference([got], [wanted]) == pytest.approx(share, rel=1e-3)


def test_other_shapes_and_values_that_are_not_finite_are_infinitely_different() -> None:
    wanted = np.zeros((2, 3), np.float32)
    assert float_difference([wanted.T], [wanted]) == float("inf")
    assert float_difference([wanted + np.nan], [wanted]) == float("inf")
    assert float_difference([wanted, wanted + 1], [wanted, wanted]) > 1
    assert float_difference([wanted], [wanted]) == 0.0


@given(st.floats(-40, 100))
def test_signal_to_noise_is_in_decibel(ratio_db: float) -> None:
    signal = np.random.default_rng(0).normal(size=1000)
    noise = np.random.default_rng(1).normal(size=1000)
    noise *= np.sqrt((signal**2).sum() / (noise**2).sum()) * 10 ** (-ratio_db / 20)
    assert sqnr_db(signal, signal + noise) == pytest.approx(ratio_db, abs=1e-3)


def test_signal_to_noise_of_what_is_not_finite_is_the_worst() -> None:
    ones = np.ones(3)
    assert sqnr_db(ones, ones * np.nan) == -200.0
    assert sqnr_db(ones, ones * np.inf) == -200.0

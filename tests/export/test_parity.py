import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from autocompress.core.candidate import parse_precision
from autocompress.core.errors import StageError
from autocompress.export.graph import to_bytes
from autocompress.export.parity import (
    _giving,
    _pairs,
    check_optimised,
    check_simulated,
    first_below,
    float_difference,
    layer_sqnr,
    run_onnx,
    sqnr_db,
)
from tests.export.conftest import Exported, executed

Get = Callable[[str], Exported]


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


def test_optimisation_may_not_lead_away_from_the_outputs_without_integers() -> None:
    feeds = {"input": np.full((2, 4), 0.4, np.float32)}
    data = rounded_twice(0.3, 0.01)
    plain = run_onnx(data, feeds, optimise=False)
    fast = run_onnx(data, feeds)
    between = [(p + f) / 2 for p, f in zip(plain, fast, strict=True)]
    nearer = [(2 * p + f) / 3 for p, f in zip(plain, fast, strict=True)]  # half as far from the unoptimised ones: 6 dB
    for exact in (list[np.ndarray](), plain, nearer):
        with pytest.raises(StageError, match="optimised outputs disagree"):
            check_optimised(data, feeds, exact=lambda exact=exact: exact)
    for exact in (fast, between):
        assert check_optimised(data, feeds, exact=lambda exact=exact: exact) < 10


def test_each_layers_ratio_stands_in_order_and_falls_where_rounding_is_coarse(exported: Get, tmp_path: Path) -> None:
    case = exported("residual")
    plain, names = to_bytes(case.filled()), list(case.template.nodes)
    fine = layer_sqnr(plain, case.lowered(case.uniform("w7a8")), case.feeds(), names)
    assert list(fine) == [node.name for node in case.filled().graph if node.name in names]
    assert min(fine.values()) > 25
    coarse_data = case.lowered({**case.uniform("w7a8"), "conv2": parse_precision("w2a8")})
    coarse = layer_sqnr(plain, coarse_data, case.feeds(), names)
    before = list(fine)[: list(fine).index("conv2")]
    assert [coarse[name] for name in before] == [fine[name] for name in before]
    assert first_below(coarse, 22.0).startswith("; the first layer to differ is 'conv2', ")
    assert first_below(fine, 22.0) == ""


def test_layers_run_on_integers_while_they_are_looked_at(exported: Get, tmp_path: Path) -> None:
    case = exported("residual")
    data, names = case.lowered(case.uniform("w7a8")), list(case.template.nodes)
    watched = _giving(data, [given for _, given in _pairs(data, data, names).values()])
    found, seen = (
        sorted(kind for kind in executed(file, tmp_path).values() if kind in ("QLinearConv", "QGemm"))
        for file in (data, watched)
    )
    assert found == seen


def test_a_file_that_is_not_what_was_simulated_is_refused_by_the_first_layer_that_differs(exported: Get) -> None:
    case = exported("residual")
    feeds, names = case.feeds(), list(case.template.nodes)
    simulated = case.lowered(case.uniform("w7a8"))
    wrong = case.lowered({**case.uniform("w2a2"), "conv": parse_precision("w7a8")})
    by_layer = functools.partial(layer_sqnr, simulated, wrong, feeds, names)
    message = r"not those that were simulated: -?\d+\.\d dB, at least 25 .*the first layer to differ is 'conv1'"
    with pytest.raises(StageError, match=message) as caught:
        check_simulated(run_onnx(simulated, feeds), run_onnx(wrong, feeds), by_layer, least_db=25)
    assert caught.value.stage == "parity"
    same = run_onnx(simulated, feeds, optimise=False)
    assert check_simulated(same, run_onnx(simulated, feeds), lambda: {}) > 30


def test_what_optimisation_breaks_is_blamed_on_its_layer() -> None:
    feeds = {"input": np.full((2, 4), 0.4, np.float32)}
    data = onnx.load_from_string(rounded_twice(1.0, 0.01))
    data.graph.node[-1].output[0] = "rounded"
    data.graph.node.append(helper.make_node("Neg", ["rounded"], ["output"], name="layer"))
    with pytest.raises(StageError, match=r"the first layer to differ is 'layer', -?\d+\.\d dB"):
        check_optimised(data.SerializeToString(), feeds, ["layer"])


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

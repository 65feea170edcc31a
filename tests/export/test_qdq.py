from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from autocompress.core.candidate import LayerChoice, parse_precision
from autocompress.core.errors import StageError
from autocompress.export.graph import to_bytes
from autocompress.export.parity import check_optimised, sqnr_db
from autocompress.export.qdq import integer_units, integer_weight_bits, lower
from tests.export.conftest import CASES, Exported, executed, kinds, run
from tests.export.graphs import conv, graph_of, linear, normal, seen

Get = Callable[[str], Exported]
W7A8 = parse_precision("w7a8")  # exact on every x86; 8 bits overflow where there is no VNNI


def worst_sqnr(case: Exported, data: bytes) -> float:
    wanted = case.torch(case.net)
    return min(sqnr_db(w, g) for w, g in zip(wanted, run(data, case.feeds()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_integers_of_all_layers_are_near_float(exported: Get, name: str) -> None:
    case = exported(name)
    data = case.lowered(case.uniform("w7a8"))
    assert worst_sqnr(case, data) > 30
    assert worst_sqnr(case, case.lowered(case.uniform("w4a8"))) > 12
    assert check_optimised(data, case.feeds(4)) > 30


@pytest.mark.parametrize("name", CASES)
def test_no_choice_leaves_the_float_graph(exported: Get, name: str) -> None:
    case = exported(name)
    assert case.lowered({}) == case.lowered(case.uniform("fp32")) == to_bytes(case.filled())


@pytest.mark.parametrize("names", [("conv1", "conv2"), ("conv", "fc"), ("conv", "conv1", "conv2", "conv3", "short")])
def test_the_runtime_runs_the_chosen_layers_on_integers_and_no_others(
    exported: Get, tmp_path: Path, names: tuple[str, ...]
) -> None:
    case = exported("residual")
    data = case.lowered(case.uniform("w7a8", names))
    assert worst_sqnr(case, data) > 25
    found = executed(data, tmp_path)
    integer = sum(kind in ("QLinearConv", "QGemm") for kind in found.values())
    floating = sum(kind in ("Conv", "FusedConv", "Gemm") for kind in found.values())
    assert (integer, floating) == (len(names), len(case.template.nodes) - len(names))
    for name in names:
        (kind,) = {kind for node, kind in found.items() if node.split("_token")[0] == name}
        assert kind in ("QLinearConv", "QGemm")


def test_additions_pools_and_concatenations_inside_integer_regions_are_integer(exported: Get, tmp_path: Path) -> None:
    case = exported("residual")
    inside = executed(case.lowered(case.uniform("w7a8")), tmp_path)
    assert inside["node_add_40"] == "QLinearAdd"
    broken = executed(case.lowered(case.uniform("w7a8", [n for n in case.template.nodes if n != "conv"])), tmp_path)
    assert broken["node_add_40"] == "Add"
    case = exported("branches")
    found = executed(case.lowered(case.uniform("w7a8")), tmp_path)
    assert found["node_cat"] == "QLinearConcat"
    assert "Add" not in found.values()


def test_a_join_that_feeds_no_integer_node_stays_float(exported: Get) -> None:
    case = exported("residual")
    names = ("conv", "conv1", "conv2")
    units = integer_units(case.filled().graph, {*names})
    assert {unit.node.name for unit in units} == {*names}


def test_attention_softmax_and_normalisation_stay_float(exported: Get, tmp_path: Path) -> None:
    case = exported("encoder")
    found = executed(case.lowered(case.uniform("w7a8")), tmp_path)
    for layer in ("q", "k", "v", "out", "up", "down"):
        assert found[layer] == "QLinearMatMul"
    rest = [kind for node, kind in found.items() if node not in case.template.nodes]
    assert rest.count("Softmax") == 1
    assert rest.count("LayerNormalization") == 3
    assert "Where" in rest
    assert not any(kind.startswith("QLinear") for kind in rest)


def test_the_last_linear_gives_floats_that_no_rounding_has_touched(exported: Get) -> None:
    case = exported("flat")
    model = onnx.load_from_string(case.lowered(case.uniform("w7a8")))
    (last,) = (node for node in model.graph.node if "output" in node.output)
    assert (last.op_type, last.name) == ("Gemm", "fc")
    assert len(np.unique(run(model.SerializeToString(), case.feeds())[0])) > 250


def test_a_float_output_that_an_integer_layer_also_reads_stays_exact(exported: Get) -> None:
    case = exported("encoder")
    data = case.lowered(case.uniform("w7a8", ["head"]))
    _, pooled = run(data, case.feeds())
    np.testing.assert_allclose(pooled, case.torch(case.net)[1], rtol=1e-4, atol=1e-5)


def test_an_integer_output_of_the_graph_keeps_its_name() -> None:
    weight, bias, x = normal(4, 3, 3, 3), normal(4), normal(2, 3, 8, 8, seed=1)
    (wanted,) = run(to_bytes(conv(weight, bias)), {"input": x})
    data = to_bytes(lower(conv(weight, bias), {"conv": W7A8}, seen(x, wanted), "minmax"))
    model = onnx.load_from_string(data)
    assert [o.name for o in model.graph.output] == ["output"]
    assert next(n.op_type for n in model.graph.node if "output" in n.output) == "DequantizeLinear"
    (got,) = run(data, {"input": x})
    assert sqnr_db(wanted, got) > 30
    assert len(np.unique(got)) <= 256


def test_rectifiers_are_dropped_only_where_saturation_does_the_same(exported: Get) -> None:
    case = exported("separable")
    layers = case.uniform("w7a8")
    assert kinds(to_bytes(case.filled())).count("Clip") == 4
    assert "Clip" not in kinds(case.lowered(layers))
    name = "hardtanh_1"
    wider = case.lowered(layers, {**case.stats, name: replace(case.stats[name], high=8.0)})
    negative = case.lowered(layers, {**case.stats, name: replace(case.stats[name], low=-1.0)})
    assert kinds(wider).count("Clip") == kinds(negative).count("Clip") == 1
    # A percentile below 6 clips earlier than ReLU6 would: nothing is lost by dropping it.
    lower_top = case.lowered(layers, {**case.stats, name: replace(case.stats[name], high=5.0)})
    assert "Clip" not in kinds(lower_top)


@pytest.mark.parametrize(("low", "dropped"), [(0.0, True), (-0.5, False)])
def test_a_relu_is_dropped_only_where_zero_is_the_lowest_integer(low: float, dropped: bool) -> None:
    weight, x = normal(6, 5), normal(8, 5, seed=1)
    second = helper.make_node("Gemm", ["relu", "v"], ["output"], name="last", transB=1)
    nodes = [
        helper.make_node("Gemm", ["input", "w"], ["sum"], name="fc", transB=1),
        helper.make_node("Relu", ["sum"], ["relu"], name="rectifier"),
        second,
    ]
    model = graph_of(nodes, {"w": weight, "v": normal(3, 6, seed=2)}, [None, 5])
    stats = seen(x, np.maximum(x @ weight.T, 0), x, names=("input", "relu", "output"))
    stats["relu"] = replace(stats["relu"], low=low)
    data = to_bytes(lower(model, {"fc": W7A8, "last": W7A8}, stats, "minmax"))
    assert ("Relu" not in kinds(data)) == dropped


def test_bias_of_a_silent_channel_does_not_overflow() -> None:
    weight, bias, x = normal(4, 6), np.array([1.0, -3.0, 1e4, 0.5], np.float32), normal(8, 6, seed=1)
    weight[[1, 2]] = 0
    wanted = x @ weight.T + bias
    data = to_bytes(lower(linear(weight, bias), {"fc": W7A8}, seen(x, wanted), "minmax"))
    (got,) = run(data, {"input": x})
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=0.1)


def test_weights_of_each_channel_have_their_own_scale() -> None:
    weight, x = normal(4, 16), normal(64, 16, seed=1)
    weight *= np.array([[1e-3], [1.0], [30.0], [0.1]], np.float32)
    (got,) = run(to_bytes(lower(linear(weight), {"fc": W7A8}, seen(x, x @ weight.T), "minmax")), {"input": x})
    for channel in range(4):
        assert sqnr_db((x @ weight.T)[:, channel], got[:, channel]) > 30


def test_a_value_read_twice_by_one_addition_is_integer() -> None:
    weight, bias, x = normal(4, 3, 3, 3), normal(4), normal(2, 3, 8, 8, seed=1)
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Add", ["c", "c"], ["twice"], name="add"),
        helper.make_node("Conv", ["twice", "v"], ["output"], name="last"),
    ]
    build = {"w": weight, "b": bias, "v": normal(2, 4, 1, 1)}
    (wanted,) = run(to_bytes(graph_of(nodes, build, [None, 3, 8, 8])), {"input": x})
    (c,) = run(to_bytes(conv(weight, bias)), {"input": x})
    stats = seen(x, c, 2 * c, wanted, names=("input", "c", "twice", "output"))
    data = to_bytes(lower(graph_of(nodes, build, [None, 3, 8, 8]), {"conv": W7A8, "last": W7A8}, stats, "minmax"))
    assert sqnr_db(wanted, run(data, {"input": x})[0]) > 25


def test_an_addition_of_a_constant_stays_float() -> None:
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["m"], name="fc"),
        helper.make_node("Add", ["m", "b"], ["a"], name="bias"),
        helper.make_node("MatMul", ["a", "v"], ["output"], name="last"),
    ]
    weights = {"w": normal(5, 6), "b": normal(6), "v": normal(6, 3)}
    units = integer_units(graph_of(nodes, weights, [None, 5]).graph, {"fc", "last"})
    assert [unit.node.name for unit in units] == ["fc", "last"]


@pytest.mark.parametrize(
    ("layers", "stats", "stage", "message"),
    [
        ({"fcs": W7A8}, {}, "export", "layer 'fcs' is not in the exported graph"),
        ({"fc": W7A8}, {}, "calibrate", "no range is known of tensor 'input'"),
    ],
)
def test_what_cannot_be_lowered_fails_by_name(
    layers: dict[str, LayerChoice], stats: dict[str, object], stage: str, message: str
) -> None:
    with pytest.raises(StageError, match=message) as caught:
        lower(linear(normal(4, 4)), layers, stats, "minmax")  # type: ignore[arg-type]
    assert caught.value.stage == stage


@pytest.mark.parametrize(
    ("facts", "bits"),
    [
        ({"arch": "x86_64", "flags": "avx2 fma"}, 7),
        ({"arch": "x86_64"}, 7),
        ({"arch": "AMD64", "flags": ""}, 7),
        ({"arch": "x86_64", "flags": "avx2 avx512_vnni"}, 8),
        ({"arch": "x86_64", "flags": "avx_vnni"}, 8),
        ({"arch": "aarch64", "flags": "asimd"}, 8),
        ({}, 8),
    ],
)
def test_weights_of_eight_bits_need_kernels_that_do_not_overflow(facts: dict[str, str], bits: int) -> None:
    assert integer_weight_bits(facts) == bits

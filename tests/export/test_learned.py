"""What was learned reaches the file, and activations have as many values as was chosen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from autocompress.compress.quantize import Learned, activation_scale, quantize_weight
from autocompress.core.candidate import LayerChoice, parse_precision
from autocompress.export.graph import to_bytes
from autocompress.export.parity import check_optimised, sqnr_db
from autocompress.export.qdq import lower
from autocompress.export.weights import round_weight
from tests.export.conftest import Exported, executed, kinds, run
from tests.export.graphs import conv, graph_of, linear, normal, seen

Get = Callable[[str], Exported]
W4A8, W7A8 = parse_precision("w4a8"), parse_precision("w7a8")


def values(data: bytes) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}


def on_grid(bits: int, shape: tuple[int, ...] = (6, 20)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers that do not fill their range, scales, and their products."""
    top = 2 ** (bits - 1) - 1
    q = np.random.default_rng(3).integers(-top, top + 1, shape) // 2
    scale = np.logspace(-3, -1, shape[0], dtype=np.float32)
    return q, scale, (q * scale.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["w{}a8", "w{}a32"])
def test_weights_on_a_learned_grid_are_its_integers(bits: int, kind: str) -> None:
    q, scale, weight = on_grid(bits)
    layer, x = parse_precision(kind.format(bits)), normal(4, 20)
    stats = seen(x, x @ weight.T)
    data = to_bytes(lower(linear(weight), {"fc": layer}, stats, "minmax", Learned(scales={"fc": scale})))
    found = values(data)
    np.testing.assert_array_equal(found["fc.weight_scale" if layer.kernel == "int8" else "fc.scale"].ravel(), scale)
    (got,) = run(data, {"input": np.eye(20, dtype=np.float32)})
    if layer.kernel == "float":
        np.testing.assert_allclose(got.T, weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(round_weight(weight, bits, 0, scale)[0], q)
    own = quantize_weight(weight, bits, 0)[1]
    assert np.abs(own - scale).max() > 0.1 * scale.max()  # the export alone would have taken others


def test_learned_scales_of_other_weights_are_not_used() -> None:
    weight = normal(4, 20)
    layers, stats = {"fc": W4A8}, seen(normal(4, 20), normal(4, 4))
    wrong = Learned(scales={"fc": np.full(4, 0.7, np.float32)})
    assert to_bytes(lower(linear(weight), layers, stats, "minmax", wrong)) == to_bytes(
        lower(linear(weight), layers, stats, "minmax")
    )


def test_a_learned_range_is_that_of_the_tensor_before_the_pool_too(exported: Get) -> None:
    x = normal(2, 3, 8, 8)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "v"], ["output"], name="last"),
    ]
    model = graph_of(nodes, {"w": normal(4, 3, 3, 3), "v": normal(2, 4, 1, 1)}, [None, 3, 8, 8])
    stats = seen(x, x, x, x, names=("input", "c", "p", "output"))
    learned = Learned(inputs={"conv": (-1.0, 1.55), "last": (-0.5, 2.05)})
    found = values(to_bytes(lower(model, {"conv": W7A8, "last": W7A8}, stats, "minmax", learned)))
    scales = {name: (float(found[f"{name}.scale"]), int(found[f"{name}.zero_point"])) for name in ("input", "c", "p")}
    assert scales["input"] == pytest.approx((0.01, 100))
    assert scales["c"] == scales["p"] == pytest.approx((0.01, 50))
    assert found["output.scale"] == np.float32(activation_scale(stats["output"], "minmax", "output").scale)


@pytest.mark.parametrize("bits", range(2, 8))
def test_activations_have_no_more_values_than_their_bits(bits: int, tmp_path: Path) -> None:
    weight, x = normal(4, 3, 3, 3), normal(8, 3, 8, 8, seed=1)
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "v"], ["output"], name="last"),
    ]
    weights = {"w": weight, "b": normal(4), "v": np.ones((1, 4, 1, 1), np.float32)}
    (wanted,) = run(to_bytes(graph_of(nodes, weights, [None, 3, 8, 8])), {"input": x})
    r = np.maximum(run(to_bytes(conv(weight, weights["b"])), {"input": x})[0], 0)
    stats = seen(x, r, wanted, names=("input", "r", "output"))
    layers = {"conv": W7A8, "last": parse_precision(f"w7a{bits}")}
    data = to_bytes(lower(graph_of(nodes, weights, [None, 3, 8, 8]), layers, stats, "minmax"))
    assert "Relu" not in kinds(data)
    model = onnx.load_from_string(data)
    model.graph.output.append(helper.make_tensor_value_info("r.dq", onnx.TensorProto.FLOAT, [None] * 4))
    got, between = run(model.SerializeToString(), {"input": np.concatenate([x, 9 * x])})  # far outside as well
    assert len(np.unique(between)) == 2**bits
    found = executed(data, tmp_path)
    assert list(found.values()).count("QLinearConv") == 2, found
    assert sqnr_db(wanted, got[:8]) > 6 * bits - 6
    check_optimised(data, {"input": x})


def test_a_layer_reads_its_few_values_while_an_addition_reads_eight_bits(exported: Get, tmp_path: Path) -> None:
    case = exported("residual")
    layers = case.uniform("w7a8")
    few: dict[str, LayerChoice] = {**layers, "conv1": parse_precision("w7a3")}
    data = case.lowered(few)
    model = onnx.load_from_string(data)
    model.graph.output.append(helper.make_tensor_value_info("conv1.input.dq", onnx.TensorProto.FLOAT, [None] * 4))
    assert len(np.unique(run(model.SerializeToString(), case.feeds())[-1])) in (7, 8)
    exact = case.torch(case.net)[0]
    plain = sqnr_db(exact, run(case.lowered(layers), case.feeds())[0])
    all_few = sqnr_db(exact, run(case.lowered(case.uniform("w7a3")), case.feeds())[0])
    assert all_few < sqnr_db(exact, run(data, case.feeds())[0]) < plain
    found = executed(data, tmp_path)
    assert any(name.startswith("conv1") and kind == "QLinearConv" for name, kind in found.items()), found
    check_optimised(data, case.feeds(4))

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocompress.compress.quantize import Learned
from autocompress.config import load_profile
from autocompress.core.candidate import FloatPrecision, LayerChoice, parse_precision
from autocompress.core.errors import StageError
from autocompress.core.recipe import Calibrator
from autocompress.export.graph import to_bytes
from autocompress.export.parity import run_onnx, sqnr_db
from autocompress.export.symmetric import Dialect, lower_symmetric, weighted_layers
from autocompress.export.tensorrt import tensorrt_uniform_int8
from tests.export.conftest import CASES, Exported, kinds, run
from tests.export.graphs import conv, graph_of, linear, normal, seen, table

Get = Callable[[str], Exported]
W8A8 = parse_precision("w8a8")
PROFILE = replace(
    load_profile("cpu-onnxruntime"), runtime="tensorrt", dialect="int8", float_precisions=("fp32", "fp16")
)


def lowered(
    case: Exported,
    layers: dict[str, LayerChoice],
    dialect: Dialect = "int8",
    floats: FloatPrecision = "fp32",
    calibrator: Calibrator = "minmax",
) -> bytes:
    return to_bytes(lower_symmetric(case.filled(), layers, case.stats, calibrator, dialect=dialect, floats=floats))


def eight(case: Exported, precision: str = "w8a8") -> dict[str, LayerChoice]:
    """All layers that compute, tables aside."""
    kinds_of = {str(node.name): node.op_type for node in case.filled().graph}
    return {n: parse_precision(precision) for n in case.template.nodes if kinds_of[n] != "Gather"}


def worst(case: Exported, data: bytes) -> float:
    """What the file says, not what this processor's kernels make of it: they fuse pairs that were made for another."""
    wanted = case.torch(case.net)
    return min(sqnr_db(w, g) for w, g in zip(wanted, run_onnx(data, case.feeds(), optimise=False), strict=True))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.mark.parametrize("dialect", ["int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_eight_bits_of_all_layers_are_near_float(exported: Get, name: str, dialect: Dialect) -> None:
    case = exported(name)
    data = lowered(case, eight(case), dialect)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert worst(case, data) > (25 if dialect == "int8" else 18)


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "mse", "entropy"])
def test_every_calibrator_finds_a_range(exported: Get, calibrator: Calibrator) -> None:
    case = exported("residual")
    assert worst(case, lowered(case, eight(case), calibrator=calibrator)) > 20


@pytest.mark.parametrize("name", CASES)
def test_no_choice_leaves_the_float_graph(exported: Get, name: str) -> None:
    assert lowered(exported(name), {}) == to_bytes(exported(name).filled())


@pytest.mark.parametrize("dialect", ["int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_all_that_tensorrts_importer_refuses_is_absent(exported: Get, name: str, dialect: Dialect) -> None:
    """Zero points other than 0, uint8, int32 biases and scales that are not positive."""
    model = onnx.load_from_string(lowered(exported(name), eight(exported(name)), dialect))
    values = constants(model)
    pairs = [node for node in model.graph.node if node.op_type.endswith("quantizeLinear") or "Quantize" in node.op_type]
    assert pairs
    for node in pairs:
        scale, zero = values[node.input[1]], values[node.input[2]]
        assert (scale > 0).all()
        assert not zero.astype(np.float32).any()
        assert zero.dtype == (np.int8 if dialect == "int8" else ml_dtypes.float8_e4m3fn)
        assert zero.size == scale.size
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            assert values[node.input[2]].dtype == np.float32


def test_eight_bit_layers_read_pairs_and_their_outputs_are_not_rounded(exported: Get) -> None:
    case = exported("separable")
    model = onnx.load_from_string(lowered(case, eight(case)))
    made = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.name in case.template.nodes]
    assert len(layers) == len(case.template.nodes)
    for node in layers:
        assert [made[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    assert kinds(model.SerializeToString()).count("QuantizeLinear") == len(layers)
    assert not any(
        made[node.input[0]].op_type == "Conv"
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in made
    )


def test_rectifiers_stay(exported: Get) -> None:
    case = exported("separable")
    before = kinds(to_bytes(case.filled()))
    after = kinds(lowered(case, eight(case)))
    assert [after.count(kind) for kind in ("Relu", "Clip")] == [before.count(kind) for kind in ("Relu", "Clip")]


def test_of_an_addition_behind_a_convolution_the_residual_alone_is_rounded(exported: Get) -> None:
    case = exported("residual")
    model = onnx.load_from_string(lowered(case, eight(case)))
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    additions = [sorted(made[name] for name in node.input) for node in model.graph.node if node.op_type == "Add"]
    assert ["Conv", "DequantizeLinear"] in additions
    assert ["DequantizeLinear", "DequantizeLinear"] not in additions


def test_what_a_float_layer_reads_is_not_rounded(exported: Get) -> None:
    case = exported("residual")
    float_layers = {name for name in case.template.nodes if name != "conv1"}
    model = onnx.load_from_string(lowered(case, {"conv1": W8A8}))
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name in float_layers:
            assert "DequantizeLinear" not in [made.get(name) for name in node.input]


@pytest.mark.parametrize("dialect", ["int8", "fp8"])
def test_scales_are_those_of_the_largest_magnitude(dialect: Dialect) -> None:
    weight, bias = normal(4, 3, 3, 3), normal(4)
    weight[2] = 0
    x = np.clip(normal(2, 3, 8, 8, seed=1), -2.0, 1.0)
    x[0, 0, 0, 0] = -2.0
    model = onnx.load_from_string(
        to_bytes(lower_symmetric(conv(weight, bias), {"conv": W8A8}, seen(x, x), "minmax", dialect=dialect))
    )
    values = constants(model)
    top = 127 if dialect == "int8" else 448
    np.testing.assert_allclose(values["input.scale"], 2.0 / top, rtol=1e-6)
    largest = np.abs(weight).reshape(4, -1).max(1)
    np.testing.assert_allclose(values["conv.weight_scale"], np.maximum(largest / top, 1e-9), rtol=1e-6)
    np.testing.assert_array_equal(values["b"], bias)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_every_float_is_in_the_precision_but_inputs_and_outputs(
    exported: Get, name: str, precision: FloatPrecision
) -> None:
    case = exported(name)
    for layers in ({}, eight(case)):
        model = onnx.load_from_string(lowered(case, layers, floats=precision))
        onnx.checker.check_model(model, full_check=True)
        kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        edges = {v.name for v in (*model.graph.input, *model.graph.output)}
        assert not [n for n, found in types.items() if found == TensorProto.FLOAT and n not in edges]
        assert kind in types.values()
        before = case.filled().graph
        assert [(v.name, v.type.tensor_type.elem_type) for v in model.graph.input] == [
            (v.name, v.dtype.value) for v in before.inputs
        ]
        assert {v.type.tensor_type.elem_type for v in model.graph.output} == {TensorProto.FLOAT}
        assert [v.name for v in model.graph.output] == [v.name for v in before.outputs]


@pytest.mark.parametrize("name", CASES)
def test_half_precision_computes_the_same_to_its_rounding(exported: Get, name: str) -> None:
    case = exported(name)
    assert worst(case, lowered(case, {}, floats="fp16")) > 45
    assert worst(case, lowered(case, eight(case), floats="fp16")) > 25


def test_scales_too_small_for_half_precision_stay_positive_and_the_weights_right() -> None:
    weight, x = normal(4, 16), normal(64, 16, seed=1)
    weight *= np.array([[1e-5], [1.0], [0.0], [1e-3]], np.float32)
    wanted = x @ weight.T
    data = to_bytes(
        lower_symmetric(linear(weight), {"fc": W8A8}, seen(x, wanted), "minmax", dialect="int8", floats="fp16")
    )
    scales = constants(onnx.load_from_string(data))["fc.weight_scale.fp16"]
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    (got,) = run(data, {"input": x})
    assert [round(sqnr_db(wanted[:, i], got[:, i])) > 30 for i in (1, 3)] == [True, True]


def test_a_mask_beyond_half_precision_becomes_its_largest_number_not_infinity() -> None:
    nodes = [helper.make_node("Add", ["input", "mask"], ["output"], name="add")]
    model = graph_of(nodes, {"mask": np.array([-3e38, 0.0, 1.0], np.float32)}, [None, 3])
    (got,) = run(
        to_bytes(lower_symmetric(model, {}, {}, "minmax", dialect="int8", floats="fp16")), {"input": normal(2, 3)}
    )
    assert np.isfinite(got).all()


@pytest.mark.parametrize(("inputs", "block"), [(256, 128), (96, 32), (10, 10)])
@pytest.mark.parametrize("floats", ["fp32", "fp16"])
def test_four_bit_weights_of_products_lie_in_blocks(inputs: int, block: int, floats: FloatPrecision) -> None:
    weight, x = normal(12, inputs), normal(32, inputs, seed=1)
    weight[:, : inputs // 2] *= 50
    choice = {"fc": parse_precision("w4a32")}
    data = to_bytes(lower_symmetric(linear(weight, normal(12)), choice, {}, "minmax", dialect="int8", floats=floats))
    model = onnx.load_from_string(data)
    (node,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    found = {a.name: a.i for a in node.attribute}
    assert found == {"axis": 0, "block_size": block}
    packed = next(t for t in model.graph.initializer if t.name == node.input[0])
    assert (packed.data_type, list(packed.dims)) == (TensorProto.INT4, [inputs, 12])
    assert "QuantizeLinear" not in kinds(data)
    assert sqnr_db(x @ weight.T + normal(12), run(data, {"input": x})[0]) > 14


def test_stored_weights_of_eight_bits_keep_float_activations(exported: Get) -> None:
    case = exported("encoder")
    for precision in ("w8a32", "w5a32"):
        data = lowered(case, {name: parse_precision(precision) for name in case.template.nodes}, "fp8", "fp16")
        assert "QuantizeLinear" not in kinds(data)
        assert worst(case, data) > (30 if precision == "w8a32" else 15)


@pytest.mark.parametrize(
    ("precision", "dialect", "message"),
    [
        ("w16a32", "int8", "TensorRT has no w16a32 for 'conv', a Conv: .* choose a float precision"),
        ("w4a32", "int8", "TensorRT has no w4a32 for 'conv', a Conv: 4-bit weights are for matrix products only"),
        ("w4a8", "fp8", "TensorRT has no w4a8 for 'conv', a Conv: eight-bit floats have no smaller weights"),
    ],
)
def test_what_tensorrt_does_not_have_is_refused_by_name(precision: str, dialect: Dialect, message: str) -> None:
    model = conv(normal(4, 3, 3, 3), normal(4))
    with pytest.raises(StageError, match=message) as caught:
        lower_symmetric(model, {"conv": parse_precision(precision)}, {}, "minmax", dialect=dialect)
    assert caught.value.stage == "export"


@pytest.mark.parametrize(
    ("layers", "stage", "message"),
    [
        ({"fcs": W8A8}, "export", "layer 'fcs' is not in the exported graph"),
        ({"fc": W8A8}, "calibrate", "no range is known of tensor 'input'"),
        ({"fc": parse_precision("w4a32")}, "export", "4-bit weights lie two to a byte, 'fc' has 15 of them"),
    ],
)
def test_what_cannot_be_lowered_fails_by_name(layers: dict[str, LayerChoice], stage: str, message: str) -> None:
    with pytest.raises(StageError, match=message) as caught:
        lower_symmetric(linear(normal(3, 5)), layers, {}, "minmax", dialect="int8")
    assert caught.value.stage == stage


def test_a_range_that_is_not_finite_is_refused() -> None:
    stats = seen(np.array([1.0, np.inf]), np.zeros(1))
    with pytest.raises(StageError, match=r"activation 'input' ranges from 1\.0 to inf"):
        lower_symmetric(linear(normal(3, 5)), {"fc": W8A8}, stats, "minmax", dialect="int8")


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_the_vendors_recipe_quantizes_every_weighted_node_and_halves_the_rest(exported: Get, name: str) -> None:
    case = exported(name)
    data = tensorrt_uniform_int8(to_bytes(case.filled()), [case.feeds(32, 1), case.feeds(32, 2)], PROFILE)
    model = onnx.load_from_string(data)
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    weighted = set(weighted_layers(case.filled().graph))
    assert weighted >= set(eight(case))
    for node in model.graph.node:
        if node.name in weighted:
            assert [made[i] for i in node.input[:2]] == ["DequantizeLinear"] * 2
    assert np.float32 not in {array.dtype.type for array in constants(model).values()}
    assert worst(case, data) > 20


def test_a_model_without_weights_to_quantize_fails_in_its_stage() -> None:
    with pytest.raises(StageError, match="no convolution or matrix product with a constant weight") as caught:
        tensorrt_uniform_int8(to_bytes(table(normal(4, 3))), [], PROFILE)
    assert caught.value.stage == "export"


def test_what_was_learned_stands_for_what_would_be_found() -> None:
    q = np.random.default_rng(0).integers(-60, 61, (8, 32))
    scale = np.logspace(-3, -1, 8, dtype=np.float32)
    weight = (q * scale[:, None]).astype(np.float32)
    x = normal(16, 32)
    learned = Learned(scales={"fc": scale}, inputs={"fc": (-0.9, 1.27)})
    model = lower_symmetric(
        linear(weight), {"fc": W8A8}, seen(x, x @ weight.T), "minmax", dialect="int8", learned=learned
    )
    found = constants(onnx.load_from_string(to_bytes(model)))
    np.testing.assert_array_equal(found["fc.weight_q"], q)
    np.testing.assert_array_equal(found["fc.weight_scale"], scale)
    assert found["input.scale"] == np.float32(0.01)


def test_four_bits_on_a_learned_grid_are_its_integers() -> None:
    q = np.random.default_rng(0).integers(-4, 5, (8, 32))
    scale = np.logspace(-3, -1, 8, dtype=np.float32)
    weight = (q * scale[:, None]).astype(np.float32)
    layers = {"fc": parse_precision("w4a32")}
    model = lower_symmetric(linear(weight), layers, {}, "minmax", dialect="int8", learned=Learned(scales={"fc": scale}))
    (got,) = run(to_bytes(model), {"input": np.eye(32, dtype=np.float32)})
    np.testing.assert_allclose(got.T, weight, rtol=1e-6)


@pytest.mark.parametrize(("precision", "why"), [("k4a32", "in a codebook"), ("w8a4", "activations of fewer bits")])
def test_what_tensorrt_has_no_form_of_is_refused(precision: str, why: str) -> None:
    with pytest.raises(StageError, match=f"TensorRT has no {precision} for 'fc', a Gemm: it .*{why}"):
        lower_symmetric(linear(normal(4, 8)), {"fc": parse_precision(precision)}, {}, "minmax", dialect="int8")


def test_entropy_clips_what_few_values_reach() -> None:
    x = np.append(normal(20_000), np.float32(40)).reshape(-1, 1)
    weight = normal(4, 1)
    scales = {}
    for calibrator in ("minmax", "entropy"):
        stats = seen(x, x @ weight.T)
        model = lower_symmetric(linear(weight), {"fc": W8A8}, stats, calibrator, dialect="int8")
        scales[calibrator] = float(constants(onnx.load_from_string(to_bytes(model)))["input.scale"])
    assert scales["entropy"] < 0.8 * scales["minmax"]

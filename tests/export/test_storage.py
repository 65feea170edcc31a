from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from autocompress.compress.cluster import codebook
from autocompress.compress.quantize import quantize_weight
from autocompress.core.candidate import Sparsity, parse_precision
from autocompress.export.graph import constant, insert, to_bytes
from autocompress.export.parity import run_onnx, sqnr_db
from autocompress.export.qdq import lower
from autocompress.export.storage import store_floats, store_integers
from autocompress.export.weights import Kernels
from tests.export.conftest import executed, kinds, run
from tests.export.graphs import graph_of, linear, normal, seen, table

WEIGHT, X = normal(256, 200), normal(16, 200, seed=1)


def stored(model: ir.Model, choice: str, **more: object) -> bytes:
    layer = next(str(node.name) for node in model.graph)
    return to_bytes(lower(model, {layer: parse_precision(choice)}, {}, "minmax"))


def integer(choice: str) -> bytes:
    stats = seen(X, X @ WEIGHT.T)
    return to_bytes(lower(linear(WEIGHT), {"fc": parse_precision(choice)}, stats, "minmax"))


def types(data: bytes) -> Counter[str]:
    """Elements by type in the initialisers of a file."""
    return Counter(
        {
            onnx.TensorProto.DataType.Name(t.data_type): int(np.prod(t.dims))
            for t in onnx.load_from_string(data).graph.initializer
            if np.prod(t.dims) == WEIGHT.size
        }
    )


@pytest.mark.parametrize(
    ("choice", "kind", "bytes_per_weight"),
    [
        ("w16a32", "FLOAT16", 2),
        ("w8a32", "INT8", 1),
        ("w7a32", "INT8", 1),
        ("w4a32", "INT4", 0.5),
    ],
)
def test_float_layers_are_stored_in_the_smallest_type_that_holds_them(
    choice: str, kind: str, bytes_per_weight: float
) -> None:
    data = stored(linear(WEIGHT), choice)
    assert types(data) == {kind: WEIGHT.size}
    assert len(data) == pytest.approx(WEIGHT.size * bytes_per_weight, rel=0.1, abs=3000)
    run(data, {"input": X})


@pytest.mark.parametrize(("bits", "bytes_per_weight"), [(2, 4 / 15), (3, 0.4), (5, 4 / 6), (6, 0.8)])
@pytest.mark.parametrize("activations", [32, 8])
def test_bits_that_have_no_type_are_packed_into_words(bits: int, bytes_per_weight: float, activations: int) -> None:
    data = stored(linear(WEIGHT), f"w{bits}a32") if activations == 32 else integer(f"w{bits}a8")
    assert len(data) == pytest.approx(WEIGHT.size * bytes_per_weight, rel=0.02, abs=4500)
    assert not types(data)
    run(data, {"input": X})


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_a_small_layer_is_not_packed_where_the_decoder_takes_more(bits: int) -> None:
    weight = normal(16, 16)
    model = linear(weight)
    assert "Mod" not in kinds(to_bytes(lower(model, {"fc": parse_precision(f"w{bits}a32")}, {}, "minmax")))


def test_four_bit_integer_layers_really_hold_four_bits_and_are_half_of_eight() -> None:
    eight, four = integer("w8a8"), integer("w4a8")
    assert types(eight) == {"INT8": WEIGHT.size}
    assert types(four) == {"INT4": WEIGHT.size}
    assert len(four) == pytest.approx(len(eight) / 2, rel=0.1)


@pytest.mark.parametrize("choice", ["w7a8", "w4a8"])
def test_fewer_stored_bits_run_in_the_same_integer_kernel(choice: str, tmp_path: Path) -> None:
    assert executed(integer(choice), tmp_path)["fc"] == "QGemm"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_stored_integers_are_decoded_to_integer_times_scale(bits: int) -> None:
    q, scale = quantize_weight(WEIGHT, bits, 0)
    (got,) = run(stored(linear(WEIGHT), f"w{bits}a32"), {"input": np.eye(200, dtype=np.float32)})
    np.testing.assert_allclose(got.T, q * scale[:, None], rtol=1e-6, atol=1e-7)


def test_float16_is_the_nearest_half() -> None:
    (got,) = run(stored(linear(WEIGHT), "w16a32"), {"input": np.eye(200, dtype=np.float32)})
    np.testing.assert_allclose(got.T, WEIGHT.astype(np.float16), rtol=1e-6, atol=1e-7)


def test_a_table_is_stored_by_row_and_looked_up_in_float() -> None:
    rows = normal(64, 32) * np.logspace(-2, 2, 64, dtype=np.float32)[:, None]
    x = np.arange(10).reshape(2, 5)
    data = stored(table(rows), "w8a32")
    (got,) = run(data, {"input": x})
    step = np.abs(rows).max(1, keepdims=True) / 127
    assert (np.abs(got - rows[x]) <= 0.51 * step[x]).all()
    assert len(data) < rows.nbytes / 2


def test_rows_of_a_table_may_have_the_values_of_a_codebook() -> None:
    rows, x = normal(128, 32), np.arange(10).reshape(2, 5)
    (got,) = run(stored(table(rows), "k4a32"), {"input": x})
    indices, book = codebook(rows, 4, "kmeans")
    np.testing.assert_array_equal(got, book[indices][x])


def sparse(ratio: float, shape: tuple[int, ...] = (256, 200)) -> np.ndarray:
    weight = normal(*shape)
    weight.reshape(-1)[np.random.default_rng(5).permutation(weight.size)[: int(ratio * weight.size)]] = 0
    return weight


def runs_of_zeros() -> np.ndarray:
    """Gaps longer than a byte counts: at the beginning, in the middle, and at the end."""
    weight = np.zeros((256, 200), np.float32)
    weight.reshape(-1)[[700, 701, 956, 957, 1212, 30_000]] = [1, -2, 3, -4, 5, 6]
    return weight


@pytest.mark.parametrize("weight", [sparse(0.5), sparse(0.9), runs_of_zeros(), np.zeros((256, 200), np.float32)])
def test_sparse_floats_are_decoded_exactly_and_smaller(weight: np.ndarray) -> None:
    model = linear(normal(*weight.shape))
    node = model.graph[0]
    node.replace_input_with(1, store_floats(model.graph, node, "fc", weight, 32))
    del model.graph.initializers["w"]
    data = to_bytes(model)
    (got,) = run(data, {"input": np.eye(200, dtype=np.float32)})
    np.testing.assert_array_equal(got.T, weight)
    assert len(data) < weight.nbytes * 0.8


@pytest.mark.parametrize("weight", [sparse(0.7), sparse(0.95), runs_of_zeros(), np.zeros((256, 200), np.float32)])
def test_sparse_integers_are_decoded_exactly_and_smaller(weight: np.ndarray) -> None:
    q = np.clip(np.rint(40 * weight), -127, 127).astype(np.int8)
    model = linear(normal(*q.shape))
    node = model.graph[0]
    found = store_integers(model.graph, node, "fc", q, 8)
    node.replace_input_with(1, insert(model.graph, node, "Cast", [found], "wide", to=ir.DataType.FLOAT.value))
    del model.graph.initializers["w"]
    data = to_bytes(model)
    (got,) = run(data, {"input": np.eye(200, dtype=np.float32)})
    np.testing.assert_array_equal(got.T, q)
    assert len(data) < q.nbytes * 0.8


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("w8a32", 1), ("w4a32", 0.5), ("k4a32", 0.5)])
@pytest.mark.parametrize("ratio", [0.5, 0.95])
def test_zeros_take_a_bit_each_or_a_byte_for_what_is_left(precision: str, bytes_each: float, ratio: float) -> None:
    weight, choice = sparse(ratio), replace(parse_precision(precision), sparsity=Sparsity(ratio=ratio))
    data = to_bytes(lower(linear(weight), {"fc": choice}, {}, "minmax"))
    left = 1 - ratio
    least = min(left * (bytes_each + 1), left * bytes_each + 4 / 31)
    assert len(data) < weight.size * least * 1.02 + 4500
    (got,) = run(data, {"input": np.eye(200, dtype=np.float32)})
    assert np.count_nonzero(got) <= np.count_nonzero(weight)
    assert sqnr_db(weight, got.T) > 10


@pytest.mark.parametrize("precision", ["k4a32", "k2a32", "k3a32", "k6a32", "p4a32", "s4a32"])
@pytest.mark.parametrize("weight", [WEIGHT, sparse(0.7), sparse(0.95), normal(7, 11)], ids=["dense", "70", "95", "odd"])
def test_a_codebook_has_that_many_values_and_is_decoded_exactly(precision: str, weight: np.ndarray) -> None:
    choice = parse_precision(precision)
    indices, book = codebook(weight, choice.weight_bits, choice.levels)
    data = to_bytes(lower(linear(weight), {"fc": choice}, {}, "minmax"))
    (got,) = run(data, {"input": np.eye(weight.shape[1], dtype=np.float32)})
    np.testing.assert_array_equal(got.T, book[indices])
    assert 2 ** (choice.weight_bits - 1) < len(np.unique(got)) <= 2**choice.weight_bits
    (stored,) = (t for t in onnx.load_from_string(data).graph.initializer if t.name == "fc.codebook")
    assert tuple(stored.dims) == (len(book),)
    assert (got.T[weight == 0] == 0).all()
    assert len(data) < weight.size * choice.weight_bits / 8 * 1.1 + 3000


@pytest.mark.parametrize("precision", ["k4a8", "p4a8", "s4a8", "k3a8", "k8a8"])
@pytest.mark.parametrize("kernel_bits", [7, 8])
def test_a_codebook_of_an_integer_layer_is_a_table_of_integers(
    precision: str, kernel_bits: int, tmp_path: Path
) -> None:
    stats = seen(X, X @ WEIGHT.T)
    choice = parse_precision(precision)
    model = linear(WEIGHT, np.zeros(256, np.float32))
    data = to_bytes(lower(model, {"fc": choice}, stats, "minmax", kernels=Kernels(bits=kernel_bits)))
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}
    book = constants["fc.codebook"].astype(int)
    assert constants["fc.codebook"].dtype == np.int8
    assert 2 ** (kernel_bits - 2) <= np.abs(book).max() < 2 ** (kernel_bits - 1)
    indices, table = codebook(WEIGHT, choice.weight_bits, choice.levels)
    got = run_onnx(data, {"input": X}, optimise=False)[0]  # without kernels that overflow at 8 bits
    assert sqnr_db(X @ table[indices].T, got) > 28
    assert set(executed(data, tmp_path).values()) <= {"QGemm", "QuantizeLinear", "DequantizeLinear"}


def test_k_means_is_nearer_than_even_steps_of_as_many_bits() -> None:
    weight = np.random.default_rng(0).laplace(size=(256, 200)).astype(np.float32)
    means, even = (
        run(stored(linear(weight), kind), {"input": np.eye(200, dtype=np.float32)})[0].T for kind in ("k3a32", "w3a32")
    )
    assert ((means - weight) ** 2).mean() < 0.8 * ((even - weight) ** 2).mean()


@pytest.mark.parametrize("choice", ["w7a8", "k4a8"])
def test_zeros_of_integer_layers_stay_in_the_file_where_kernels_need_them(choice: str) -> None:
    weight = sparse(0.8)
    sizes = []
    for kernels in (Kernels(), Kernels(sparse=False)):
        layers = {"fc": parse_precision(choice)}
        data = to_bytes(lower(linear(weight), layers, seen(X, X @ weight.T), "minmax", kernels=kernels))
        sizes.append((len(data), "CumSum" in kinds(data)))
    (small, one), (large, other) = sizes
    assert small < 0.85 * large
    assert (one, other) == (True, False)


@pytest.mark.parametrize("ratio", [0.0, 0.02])
def test_what_would_not_be_smaller_is_not_stored_sparse(ratio: float) -> None:
    model = linear(WEIGHT)
    store_floats(model.graph, model.graph[0], "fc", sparse(ratio), 32)
    assert [node.op_type for node in model.graph] == ["Gemm"]


@pytest.mark.parametrize("choice", ["fp32", "w16a32", "w8a32"])
def test_a_sparse_layer_is_smaller_in_every_precision(choice: str) -> None:
    layer = replace(parse_precision(choice), sparsity=Sparsity(ratio=0.9))
    dense, thin = (len(to_bytes(lower(linear(w), {"fc": layer}, {}, "minmax"))) for w in (WEIGHT, sparse(0.9)))
    assert thin < 0.5 * dense


def test_decoding_happens_once_while_the_file_is_loaded(tmp_path: Path) -> None:
    for data in (
        stored(linear(WEIGHT), "w4a32"),
        stored(linear(sparse(0.9)), "w8a32"),
        stored(linear(WEIGHT), "w16a32"),
        stored(linear(WEIGHT), "w3a32"),
        stored(linear(WEIGHT), "k4a32"),
        stored(linear(sparse(0.9)), "k3a32"),
        stored(linear(sparse(0.5)), "w8a32"),
    ):
        assert set(executed(data, tmp_path).values()) <= {"Gemm", "FusedGemm", "MatMul"}


def test_names_of_new_constants_never_collide() -> None:
    graph = graph_of([], {}, [1]).graph
    names = [constant(graph, "c", np.float32(i)).name for i in range(3)]
    assert len(set(names)) == 3

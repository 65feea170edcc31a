from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from autocompress.compress.quantize import quantize_weight
from autocompress.core.candidate import Sparsity, parse_precision
from autocompress.export.graph import constant, insert, to_bytes
from autocompress.export.qdq import lower
from autocompress.export.storage import store_floats, store_integers
from tests.export.conftest import executed, run
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
        ("w5a32", "INT8", 1),
        ("w4a32", "INT4", 0.5),
        ("w2a32", "INT4", 0.5),
    ],
)
def test_float_layers_are_stored_in_the_smallest_type_that_holds_them(
    choice: str, kind: str, bytes_per_weight: float
) -> None:
    data = stored(linear(WEIGHT), choice)
    assert types(data) == {kind: WEIGHT.size}
    assert len(data) == pytest.approx(WEIGHT.size * bytes_per_weight, rel=0.1, abs=3000)
    run(data, {"input": X})


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


@pytest.mark.parametrize("ratio", [0.0, 0.1])
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
    ):
        assert set(executed(data, tmp_path).values()) <= {"Gemm", "FusedGemm", "MatMul"}


def test_names_of_new_constants_never_collide() -> None:
    graph = graph_of([], {}, [1]).graph
    names = [constant(graph, "c", np.float32(i)).name for i in range(3)]
    assert len(set(names)) == 3

from collections.abc import Callable

import numpy as np
import pytest

from autocompress.compress.quantize import activation_scale
from autocompress.core.errors import StageError
from autocompress.export.calibrate import collect_stats
from autocompress.export.graph import to_bytes
from tests.export.conftest import Exported
from tests.export.graphs import linear, normal

Get = Callable[[str], Exported]


def test_extremes_are_those_of_all_items_of_all_batches() -> None:
    weight, bias = normal(6, 5), normal(6)
    batches = [normal(7, 5, seed=seed) for seed in range(3)] + [10 * normal(1, 5, seed=9)]
    stats = collect_stats(linear(weight, bias, rectified=True), ["fc"], ({"input": x} for x in batches))
    inputs = np.concatenate(batches)
    outputs = np.maximum(inputs @ weight.T + bias, 0)
    assert set(stats) == {"input", "output"}
    for name, values in (("input", inputs), ("output", outputs)):
        assert stats[name].low == pytest.approx(values.min(), abs=1e-5)
        assert stats[name].high == pytest.approx(values.max(), rel=1e-5)


def test_the_sample_is_spread_over_the_values_and_looks_like_them() -> None:
    x = normal(400, 50)
    stats = collect_stats(linear(normal(3, 50)), ["fc"], [{"input": x}])
    sample = stats["input"].sample
    assert 300 <= len(sample) <= 400
    assert np.isin(sample, x).all()
    np.testing.assert_allclose(np.quantile(sample, [0.1, 0.5, 0.9]), np.quantile(x, [0.1, 0.5, 0.9]), atol=0.2)


def test_the_graph_itself_stays_as_it_was(exported: Get) -> None:
    case = exported("residual")
    graph = case.filled()
    before = to_bytes(graph)
    collect_stats(graph, case.template.nodes, [case.feeds(2)])
    assert to_bytes(graph) == before


def test_every_tensor_that_any_choice_makes_integer_is_known(exported: Get) -> None:
    case = exported("residual")
    for names in (["conv"], ["conv", "conv1"], ["fc"], ["short", "conv3"], list(case.template.nodes)):
        assert case.lowered(case.uniform("w7a8", names))


def test_a_graph_without_layers_has_nothing_to_see() -> None:
    assert collect_stats(linear(normal(3, 5)), [], [{"input": normal(2, 5)}]) == {}


def test_values_that_are_not_finite_are_told_with_the_tensors_name() -> None:
    x = normal(4, 5)
    x[1, 2] = np.inf
    stats = collect_stats(linear(normal(3, 5)), ["fc"], [{"input": normal(4, 5)}, {"input": x}])
    with pytest.raises(StageError, match=r"activation 'input' ranges from .* to inf on the calibration data"):
        activation_scale(stats["input"], "minmax", "input")

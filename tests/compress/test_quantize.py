from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autocompress.compress.quantize import ActivationStats, activation_scale, quantize_weight
from autocompress.core.errors import StageError

WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-100, 100, width=32))
FLOATS = st.floats(-1e4, 1e4)


def decoded(q: Any, scale: Any, axis: int) -> Any:
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.astype(np.float64) * scale.reshape(shape).astype(np.float64)


def random_weight(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@given(WEIGHTS, st.integers(0, 1))
def test_eight_bits_are_off_by_half_a_step_at_most(weight: Any, axis: int) -> None:
    q, scale = quantize_weight(weight, 8, axis)
    steps = np.moveaxis(np.broadcast_to(scale.reshape(-1, 1), np.moveaxis(weight, axis, 0).shape), 0, axis)
    assert (np.abs(decoded(q, scale, axis) - weight) <= steps * 0.5001 + 1e-9).all()


@given(WEIGHTS, st.integers(2, 8), st.integers(0, 1))
def test_integers_stay_in_the_symmetric_range_of_their_bits(weight: Any, bits: int, axis: int) -> None:
    q, scale = quantize_weight(weight, bits, axis)
    assert q.dtype == np.int8
    assert q.shape == weight.shape
    assert np.abs(q).max() <= 2 ** (bits - 1) - 1
    assert scale.shape == (weight.shape[axis],)
    assert (scale > 0).all()
    assert np.isfinite(scale).all()


@given(WEIGHTS, st.integers(2, 8))
def test_zero_stays_zero_and_signs_stay(weight: Any, bits: int) -> None:
    q, _ = quantize_weight(weight, bits, 0)
    assert (q[weight == 0] == 0).all()
    assert (q.astype(np.float64) * weight >= 0).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = random_weight(4, 9)
    weight[2] = 0
    for bits in (2, 4, 8):
        q, scale = quantize_weight(weight, bits, 0)
        assert not q[2].any()
        assert 0 < scale[2] < 1e-6
        assert q[[0, 1, 3]].any(1).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_below_eight_bits_each_channels_error_is_at_most_that_of_the_largest_magnitude(bits: int) -> None:
    weight = random_weight(16, 200)
    weight[:, 0] *= 4
    top = 2 ** (bits - 1) - 1
    plain = np.abs(weight).max(1, keepdims=True) / top
    largest = ((np.clip(np.rint(weight / plain), -top, top) * plain - weight) ** 2).sum(1)
    q, scale = quantize_weight(weight, bits, 0)
    found = ((decoded(q, scale, 0) - weight) ** 2).sum(1)
    assert (found <= largest * (1 + 1e-6)).all()
    if bits <= 4:
        assert found.sum() < 0.8 * largest.sum()


def test_more_bits_are_nearer() -> None:
    weight = random_weight(8, 100)
    errors = [((decoded(*quantize_weight(weight, bits, 0), 0) - weight) ** 2).sum() for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 3, 3), 0), ((8, 6), 1), ((6, 1, 5), 0)])
def test_there_is_one_scale_for_each_index_of_the_axis(shape: tuple[int, ...], axis: int) -> None:
    weight = random_weight(*shape) * np.logspace(-2, 2, 6).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    q, scale = quantize_weight(weight.astype(np.float32), 8, axis)
    others = tuple(i for i in range(len(shape)) if i != axis)
    assert (np.abs(q).max(axis=others) == 127).all()
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=others) / 127, rtol=1e-5)


@given(FLOATS, FLOATS, st.sampled_from(["minmax", "percentile", "mse"]))
def test_an_activation_scale_holds_zero_exactly_and_its_range(one: float, other: float, calibrator: Any) -> None:
    low, high = min(one, other), max(one, other)
    sample = np.linspace(low, high, 50, dtype=np.float32)
    s = activation_scale(ActivationStats(low=low, high=high, sample=sample), calibrator, "x")
    assert 0 <= s.zero_point <= 255
    assert s.scale > 0
    if calibrator == "minmax":
        slack = s.scale * 0.51
        assert -s.zero_point * s.scale <= min(low, 0) + slack
        assert (255 - s.zero_point) * s.scale >= max(high, 0) - slack


def outliers() -> ActivationStats:
    """Normal values, two of which are 100 times too large."""
    sample = np.random.default_rng(0).normal(size=60_000).astype(np.float32)
    sample[:2] = 100, -100
    return ActivationStats(low=-100, high=100, sample=sample)


def test_calibrators_differ_where_there_are_outliers() -> None:
    stats = outliers()
    scales = {c: activation_scale(stats, c, "x").scale for c in ("minmax", "percentile", "mse")}  # type: ignore[arg-type]
    assert scales["minmax"] == pytest.approx(200 / 255)
    assert scales["percentile"] == pytest.approx(8 / 255, rel=0.15)
    assert scales["percentile"] < scales["mse"] < scales["minmax"]


def test_least_squares_is_at_least_as_near_as_the_extremes() -> None:
    stats = outliers()

    def error(s: Any) -> float:
        q = np.clip(np.rint(stats.sample / s.scale) + s.zero_point, 0, 255)
        return float((((q - s.zero_point) * s.scale - stats.sample) ** 2).mean())

    assert error(activation_scale(stats, "mse", "x")) < error(activation_scale(stats, "minmax", "x"))


def test_a_percentile_never_widens_what_calibration_saw() -> None:
    stats = replace(outliers(), low=-1.0, high=1.0)
    assert activation_scale(stats, "percentile", "x").scale == pytest.approx(2 / 255)


def test_what_is_never_negative_uses_all_integers_above_zero() -> None:
    stats = ActivationStats(low=0.0, high=6.0, sample=np.linspace(0, 6, 100, dtype=np.float32))
    s = activation_scale(stats, "minmax", "x")
    assert s.zero_point == 0
    assert s.scale == pytest.approx(6 / 255)
    shifted = activation_scale(replace(stats, low=2.0), "minmax", "x")
    assert shifted == s


def test_a_tensor_that_is_always_zero_has_a_scale() -> None:
    s = activation_scale(ActivationStats(low=0, high=0, sample=np.zeros(4, np.float32)), "mse", "x")
    assert s.scale > 0
    assert s.zero_point == 0


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_that_is_not_finite_fails_and_names_the_tensor(low: float, high: float) -> None:
    stats = ActivationStats(low=low, high=high, sample=np.zeros(4, np.float32))
    with pytest.raises(StageError, match=f"activation 'relu_3' ranges from {low} to {high} on the calibration data"):
        activation_scale(stats, "minmax", "relu_3")


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_clips_a_heavy_tail_and_keeps_an_even_range(bits: int) -> None:
    random = np.random.default_rng(0)
    tail = np.maximum(random.standard_t(2.5, size=20000), 0).astype(np.float32)
    even = random.uniform(-1, 1, 20000).astype(np.float32)
    for values, clips in ((tail, True), (even, False)):
        stats = ActivationStats(low=float(values.min()), high=float(values.max()), sample=values)
        widest, found = (activation_scale(stats, c, "x", bits).scale for c in ("minmax", "entropy"))
        assert (found < 0.8 * widest) == clips
        assert clips or found == pytest.approx(widest)

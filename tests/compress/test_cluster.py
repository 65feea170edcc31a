import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.compress.cluster import codebook
from autocompress.compress.quantize import quantize_weight

WEIGHT = np.random.default_rng(0).laplace(size=(24, 16, 3, 3)).astype(np.float32) * 0.05


@pytest.mark.parametrize("levels", ["kmeans", "power", "additive"])
@given(bits=st.integers(2, 6), seed=st.integers(0, 99))
def test_weights_have_as_many_values_as_the_bits_say(levels: str, bits: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(8, 40)).astype(np.float32)
    which, table = codebook(weight, bits, levels)  # type: ignore[arg-type]
    assert which.shape == weight.shape
    assert len(np.unique(table[which])) <= len(table) <= 2**bits
    assert list(table) == sorted(table)
    # Each weight has the nearest of them.
    nearest = np.abs(weight[..., None] - table).min(-1)
    np.testing.assert_allclose(np.abs(table[which] - weight), nearest, atol=1e-6)


def test_all_sixteen_values_are_used_and_are_better_than_even_ones() -> None:
    which, table = codebook(WEIGHT, 4, "kmeans")
    assert len(np.unique(which)) == 16
    q, scale = quantize_weight(WEIGHT, 4, 0)
    even = q * scale[:, None, None, None]
    assert ((table[which] - WEIGHT) ** 2).mean() < ((even - WEIGHT) ** 2).mean()


def test_zeros_stay_zeros_and_nothing_else_becomes_zero() -> None:
    sparse = np.where(np.abs(WEIGHT) < 0.05, 0, WEIGHT)
    which, table = codebook(sparse, 4, "kmeans")
    assert np.array_equal(table[which] == 0, sparse == 0)


def test_powers_are_powers_of_two_and_sums_are_sums_of_two_of_them() -> None:
    _, powers = codebook(WEIGHT, 4, "power")
    ratios = np.log2(powers[powers > 0] / powers.max())
    np.testing.assert_allclose(ratios, np.round(ratios), atol=1e-5)
    _, sums = codebook(WEIGHT, 4, "additive")
    # One of 0, 1, 1/4, 1/16 and one of 0, 1/2, over the largest.
    np.testing.assert_allclose(
        sums[sums > 0] / sums.max(), np.array([1 / 16, 1 / 4, 1 / 2, 9 / 16, 3 / 4, 1, 3 / 2]) / 1.5, rtol=1e-5
    )
    for table in (powers, sums):
        np.testing.assert_allclose(table, -table[::-1])


def test_few_values_stay_as_they_are() -> None:
    weight = np.array([[1.0, -2.0, 1.0, 0.0]], np.float32)
    which, table = codebook(weight, 2, "power")
    assert table.tolist() == [-2, 0, 1]
    assert np.array_equal(table[which], weight)

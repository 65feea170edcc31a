"""Properties of promotion: what one rung says of the next one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.optimize.fidelity import (
    LEAST_LOSS,
    LEAST_PAIRS,
    LEFT,
    Rated,
    band,
    contributions,
    rank_correlation,
    trusted,
)

ORIGINAL = 0.93
accuracies = st.lists(st.floats(0.1, ORIGINAL), min_size=1, max_size=8)


def pairs(share: float, count: int = 12) -> list[tuple[float, float]]:
    """Candidates of which recovery leaves that share of what they had lost."""
    lost = np.geomspace(0.005, 0.5, count)
    return [(ORIGINAL - x, ORIGINAL - share * x) for x in lost]


@given(accuracies)
def test_without_pairs_half_of_the_loss_is_expected_back(below: list[float]) -> None:
    found = band(below, [], ORIGINAL)
    assert found.expected == pytest.approx(ORIGINAL - LEFT * (ORIGINAL - np.array(below)))
    assert (found.hoped(1.0) >= found.expected).all()
    assert (found.hoped(1.0) <= ORIGINAL + LEAST_LOSS).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_the_share_that_comes_back_is_learned_and_the_band_narrows(share: float) -> None:
    few, many = (band([0.8], pairs(share, count), ORIGINAL) for count in (3, 40))
    assert abs(many.expected[0] - (ORIGINAL - share * 0.13)) < abs(few.expected[0] - (ORIGINAL - share * 0.13)) + 1e-9
    assert many.expected[0] == pytest.approx(ORIGINAL - share * 0.13, abs=0.005)
    assert many.spread[0] < few.spread[0]


def test_what_was_learned_of_small_losses_says_little_of_large_ones() -> None:
    known = [(ORIGINAL - x, ORIGINAL - 0.9 * x) for x in np.linspace(0.004, 0.006, 20)]
    found = band([ORIGINAL - 0.005, ORIGINAL - 0.5], known, ORIGINAL)
    left = (ORIGINAL - found.expected) / np.array([0.005, 0.5])
    assert left[0] > 0.85
    assert left[1] == pytest.approx(LEFT, abs=0.02)


def test_half_of_what_lies_above_the_original_is_luck_until_others_tell() -> None:
    """Recovery takes the other half too, or adds to it, and what it does there says nothing of losses."""
    above = ORIGINAL + 0.003
    assert band([above], [], ORIGINAL).expected[0] == pytest.approx(ORIGINAL + 0.0015)
    fell = [(ORIGINAL + x, ORIGINAL + x - 0.006) for x in np.linspace(0.001, 0.006, 6)]
    rose = [(ORIGINAL + x, ORIGINAL + x + 0.006) for x in np.linspace(0.001, 0.006, 6)]
    assert band([above], fell, ORIGINAL).hoped(1.0)[0] < ORIGINAL
    assert band([above], rose, ORIGINAL).expected[0] == pytest.approx(above + 0.005, abs=0.001)
    better, worse = band([above + 0.002, above], rose, ORIGINAL).expected
    assert better > worse
    lost = ORIGINAL - 0.1
    assert band([lost], rose, ORIGINAL).expected == pytest.approx(band([lost], [], ORIGINAL).expected, abs=0.005)


def test_a_rung_that_ranks_nothing_decides_nothing() -> None:
    """All candidates are hoped the same of, whatever they had below: then their costs decide."""
    rng = np.random.default_rng(0)
    known = list(zip(rng.permutation(np.linspace(0.5, 0.9, 20)), np.linspace(0.8, 0.92, 20), strict=True))
    assert not trusted(rank_correlation(known))
    found = band([0.3, 0.6, 0.9], known, ORIGINAL)
    assert np.ptp(found.hoped(1.0)) == 0
    assert len(set(np.round(band([0.3, 0.6, 0.9], known[: LEAST_PAIRS - 1], ORIGINAL).hoped(1.0), 6))) == 3


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([(1, 10), (2, 20), (3, 30), (4, 5)]) == pytest.approx(-0.2)
    assert rank_correlation([(1, 2), (2, 4), (3, 9)]) == pytest.approx(1.0)
    assert rank_correlation([(1, 1), (1, 2), (2, 3), (2, 4)]) == pytest.approx(0.8944, abs=1e-4)
    assert rank_correlation([(1, 2), (2, 3)]) is None
    assert rank_correlation([(1, 2), (1, 3), (1, 4)]) is None


def test_contributions_are_volumes_the_front_lacks() -> None:
    front = [Rated(accuracy=0.9, costs=(0.5,))]
    worst = Rated(accuracy=0.8, costs=(1.0,))
    inside = Rated(accuracy=0.85, costs=(0.6,))
    faster = Rated(accuracy=0.85, costs=(0.3,))
    outside = Rated(accuracy=0.7, costs=(0.1,))
    assert contributions([inside, faster, outside], front, worst) == pytest.approx([0.0, 0.05 * 0.2, 0.0])
    assert contributions([faster], [], worst) == pytest.approx([0.05 * 0.7])


@given(st.lists(st.tuples(st.floats(0.5, 1.0), st.floats(0.1, 1.2), st.floats(0.1, 1.2)), min_size=2, max_size=6))
def test_no_contribution_is_negative_nor_one_of_a_member(points: list[tuple[float, float, float]]) -> None:
    rated = [Rated(accuracy=a, costs=(b, c)) for a, b, c in points]
    gains = contributions(rated, rated[:-1], Rated(accuracy=0.4, costs=(1.3, 1.3)))
    assert (gains >= -1e-12).all()
    assert gains[:-1] == pytest.approx(0, abs=1e-12)

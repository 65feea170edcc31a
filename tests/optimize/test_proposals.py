"""Properties of candidates made from parents."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autocompress.optimize.proposals import MOST_CHANGED, crossings, mixed, mutations

SIZES = np.array([2, 3, 4, 1, 5])
ORDERED = np.array([True, True, False, True, False])


@given(st.integers(0, 1000), st.integers(1, 5))
def test_a_mutation_is_another_choice_of_a_few_variables(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    parents = rng.integers(0, SIZES, (count, 5))
    found = mutations(parents, SIZES, ORDERED, 40, rng)
    assert ((found >= 0) & (found < SIZES)).all()
    changed = (found != parents[np.arange(40) % count]).sum(1)
    assert changed.max() <= MOST_CHANGED
    assert (changed > 0).mean() > 0.5  # a variable of one choice cannot change


def test_numbers_mostly_go_to_the_next_one() -> None:
    rng = np.random.default_rng(0)
    found = mutations(np.full((1, 1), 5), np.array([11]), np.array([True]), 500, rng)
    assert 0.6 < (abs(found - 5) == 1).mean() < 0.9


@given(st.integers(0, 1000), st.integers(2, 5))
def test_a_crossing_has_nothing_that_no_parent_has(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    parents = rng.integers(0, 9, (count, 5))
    found = crossings(parents, 30, rng)
    assert (found[:, None] == parents[None]).any(1).all()


def test_mixing_takes_from_both_or_the_partner_whole() -> None:
    rng = np.random.default_rng(0)
    found = mixed(np.zeros((20, 50), int), np.ones((20, 50), int), rng)
    assert (found[::2] == 1).all()
    assert 0.2 < found[1::2].mean() < 0.8

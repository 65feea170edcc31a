"""Properties of fronts and of the gain that is expected over them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core.front import hypervolume, nondominated
from autocompress.optimize.improvement import Believed, Members, Region, nearest

figures = st.floats(0.0, 1.0).map(lambda x: round(x, 3))


def expected_gain(believed: Believed, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return Region(front, reference).expected_gain(believed)


def points(dimensions: int, most: int = 6) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(figures, min_size=dimensions, max_size=dimensions), min_size=0, max_size=most)


@st.composite
def fronts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    dimensions = draw(st.integers(2, 4))
    front = np.array(draw(points(dimensions))).reshape(-1, dimensions)
    point = np.array([draw(st.lists(figures, min_size=dimensions, max_size=dimensions))])
    return front, point


@given(fronts())
def test_without_doubt_the_expected_gain_is_the_gain(case: tuple[np.ndarray, np.ndarray]) -> None:
    front, point = case
    reference = np.full(point.shape[1], 1.1)
    gain = expected_gain(Believed(mean=point, deviation=np.zeros_like(point)), front, reference)
    wanted = hypervolume(np.vstack([front, point]), reference) - hypervolume(front, reference)
    assert gain[0] == pytest.approx(wanted, abs=1e-9)


@given(fronts(), st.floats(0.01, 0.5))
def test_doubt_makes_every_gain_possible_and_none_negative(
    case: tuple[np.ndarray, np.ndarray], deviation: float
) -> None:
    front, point = case
    reference = np.full(point.shape[1], 1.1)
    sure = expected_gain(Believed(mean=point, deviation=np.zeros_like(point)), front, reference)
    unsure = expected_gain(Believed(mean=point, deviation=np.full_like(point, deviation)), front, reference)
    assert unsure[0] >= 0
    assert unsure[0] >= sure[0] - 1e-9


def test_expected_gain_is_the_mean_over_draws() -> None:
    rng = np.random.default_rng(0)
    front, reference = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.1]]), np.array([1.0, 1.0])
    mean, deviation = np.array([[0.4, 0.4]]), np.array([[0.1, 0.2]])
    drawn = mean + deviation * rng.standard_normal((4000, 2))
    before = hypervolume(front, reference)
    gains = [hypervolume(np.vstack([front, d]), reference) - before for d in drawn]
    found = expected_gain(Believed(mean=mean, deviation=deviation), front, reference)[0]
    assert found == pytest.approx(np.mean(gains), abs=3 * np.std(gains) / np.sqrt(len(gains)))


@given(fronts(), st.floats(0.0, 0.1))
def test_what_is_surely_dominated_gains_nothing(case: tuple[np.ndarray, np.ndarray], worse: float) -> None:
    front, point = case
    reference = np.full(point.shape[1], 1.1)
    sure = Believed(mean=point + worse, deviation=np.zeros_like(point))
    assert expected_gain(sure, np.vstack([front, point]), reference)[0] == pytest.approx(0, abs=1e-12)


def test_far_beyond_the_reference_a_nearer_one_still_gains_more() -> None:
    """Six deviations off is no zero: otherwise nothing would tell candidates apart before any is within."""
    mean = np.array([[7.0, 0.5], [6.0, 0.5], [5.0, 0.5]])
    gain = expected_gain(Believed(mean=mean, deviation=np.ones_like(mean)), np.empty((0, 2)), np.ones(2))
    assert 0 < gain[0] < gain[1] < gain[2]


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_boxes_stay_few_with_a_wide_front(objectives: int) -> None:
    """Thinning makes a gain look larger, never smaller; over a sphere of 400 points by at most a half."""
    drawn = np.abs(np.random.default_rng(0).standard_normal((400, objectives)))
    front, reference = 1.5 - drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.full(objectives, 1.6)
    region = Region(front, reference)
    assert all(len(low) <= 2000 for _, low, _ in region._axes)
    if objectives > 3:  # where the exact volume takes long
        return
    point = np.full((1, objectives), 0.7)
    gained = hypervolume(np.vstack([front, point]), reference) - hypervolume(front, reference)
    found = region.expected_gain(Believed(mean=point, deviation=np.zeros_like(point)))[0]
    assert gained - 1e-9 <= found <= 1.5 * gained + 1e-9


@given(points(3, 20))
def test_a_front_that_grows_is_the_front_of_all(rows: list[list[float]]) -> None:
    members = Members()
    for i, row in enumerate(rows):
        members.add(i, np.array(row))
    losses = np.array(rows).reshape(-1, 3)
    assert sorted(members.numbers) == np.flatnonzero(nondominated(losses)).tolist()


def test_nearest_to_the_front_comes_first() -> None:
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.9, 0.9], [0.4, 0.5], [0.45, 0.55]])
    front = losses[[0, 1, 3]]
    assert set(nearest(losses, front, 3)) == {0, 1, 3}
    assert nearest(losses, front, 4)[-1] == 4

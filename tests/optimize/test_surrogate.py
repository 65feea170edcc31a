"""Properties of the surrogate: what it learns, and what gain it expects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core.front import hypervolume
from autocompress.optimize.surrogate import Additive, Believed, Encoding, Process, expected_gain, nearest
from tests import scripted

SPACE = scripted.space(6)
BLOCKS = {layer: block for block, members in SPACE.members.items() for layer in members}
figures = st.floats(0.0, 1.0).map(lambda x: round(x, 3))


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


def test_an_override_that_says_what_its_block_says_is_no_difference() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    base = SPACE.uniform("w8a8")
    over = base | {"layer:conv1": "w8a8"}
    other = base | {"layer:conv1": "w4a8"}
    rows = encoding.rows([base, over, other])
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).sum() == 1
    block = base | {"precision:block0": "w4a8"}
    assert (encoding.rows([block])[0] != rows[0]).sum() == 2


def test_a_sum_of_choices_is_learned_and_its_best_policy_found() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    rng = np.random.default_rng(1)
    many = [{n: c[int(rng.integers(len(c)))] for n, c in SPACE.variables.items()} for _ in range(400)]
    rows = encoding.rows(many)
    worth = rng.standard_normal(encoding.size)
    losses = worth[rows].sum(1, keepdims=True)
    additive = Additive(encoding, {})
    for start in range(0, 300, 50):
        additive.learn(rows[start : start + 50], losses[start : start + 50])
    assert additive.predict(rows[300:]) == pytest.approx(losses[300:], abs=0.2)
    best = encoding.best(additive.single(np.ones(1), rows))
    assert worth[encoding.rows([best])].sum() <= losses.min() + 0.2


def test_sums_of_effects_predict_what_no_trial_showed() -> None:
    """Of six trials little more than the scale of the effects can be learned, and that says something of all."""
    encoding = Encoding(SPACE.variables, BLOCKS)
    rng = np.random.default_rng(2)
    effects = {n: {str(c): (0.01 * i, -0.02 * i) for i, c in enumerate(cs)} for n, cs in SPACE.variables.items()}
    many = [{n: c[int(rng.integers(len(c)))] for n, c in SPACE.variables.items()} for _ in range(60)]
    rows = encoding.rows(many)
    loss = encoding.summed(effects)[rows].sum(1)[:, :1]
    guided, blind = Additive(encoding, effects), Additive(encoding, {})
    for additive in (guided, blind):
        additive.learn(rows[:6], 3 * loss[:6])
    errors = [np.abs(a.predict(rows[6:]) - 3 * loss[6:]).mean() for a in (guided, blind)]
    assert errors[0] < 0.75 * errors[1]


def test_a_process_passes_through_what_it_knows_and_doubts_what_is_far() -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 3, (40, 12)) + 3 * np.arange(12)
    residuals = np.sin(rows.sum(1, keepdims=True) / 5.0)
    process = Process(rows, residuals)
    near, far = process.predict(rows[:5]), process.predict(np.full((1, 12), 36) + np.arange(12))
    assert near.mean == pytest.approx(residuals[:5], abs=0.25)
    assert far.deviation[0, 0] > near.deviation.max()


def test_nearest_to_the_front_comes_first() -> None:
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.9, 0.9], [0.4, 0.5], [0.45, 0.55]])
    assert set(nearest(losses, 3)) == {0, 1, 3}
    assert nearest(losses, 4)[-1] == 4

"""Properties of the surrogate: what it learns, and what it doubts."""

import numpy as np
import pytest

from autocompress.optimize.encoding import Encoding, Rows
from autocompress.optimize.surrogate import LEAST_SHARE, Effects, Fit, Surrogate
from tests import scripted

SPACE = scripted.space(6)
BLOCKS = {layer: block for block, members in SPACE.members.items() for layer in members}
ENCODING = Encoding(SPACE.variables, BLOCKS)


def drawn(count: int, seed: int) -> Rows:
    """Columns of random values."""
    numbers = np.random.default_rng(seed).integers(0, ENCODING.sizes, (count, len(ENCODING.sizes)))
    return ENCODING.columns(numbers)


def fitted(rows: Rows, losses: np.ndarray, effects: Effects | None = None, near: int = 160) -> Fit:
    surrogate = Surrogate(ENCODING, effects or {}, losses.shape[1])
    for start in range(0, len(rows), 50):
        surrogate.learn(rows[start : start + 50], losses[start : start + 50])
    for _ in range(8):
        surrogate.fit(np.arange(min(near, len(rows))))
    return surrogate.fit(np.arange(min(near, len(rows))))


@pytest.mark.parametrize("near", [300, 100])
def test_a_sum_of_choices_is_learned_and_its_best_policy_found(near: int) -> None:
    """Whether all trials are points of the process, or most are far ones."""
    rows = drawn(400, 1)
    worth = np.random.default_rng(1).standard_normal(ENCODING.size)
    losses = worth[rows].sum(1, keepdims=True)
    fit = fitted(rows[:300], losses[:300], near=near)
    assert fit.predict(rows[300:]).mean == pytest.approx(losses[300:], abs=0.3)
    scores = fit.single(np.ones((1, 1)), rows[:1])
    best = ENCODING.best(scores, np.zeros((1, len(ENCODING.sizes)), np.intp))
    assert worth[ENCODING.columns(best)].sum() <= losses.min() + 0.2


def test_trials_learned_one_by_one_teach_what_they_teach_together() -> None:
    rows = drawn(40, 2)
    losses = np.random.default_rng(2).standard_normal((40, 2))
    one, other = Surrogate(ENCODING, {}, 2), Surrogate(ENCODING, {}, 2)
    one.learn(rows, losses)
    for row, loss in zip(rows, losses, strict=True):
        other.learn(row[None], loss[None])
    near = np.arange(30)
    found, again = one.fit(near).predict(rows), other.fit(near).predict(rows)
    assert found.mean == pytest.approx(again.mean)
    assert found.deviation == pytest.approx(again.deviation, abs=1e-6)


def effects(slope: float = 1.0) -> dict[str, dict[str, tuple[float, float]]]:
    return {
        name: {str(c): (0.001 * (i + k) ** 2 * (i > 0), -0.01 * slope * i) for i, c in enumerate(choices)}
        for k, (name, choices) in enumerate(SPACE.variables.items())
    }


def test_sums_of_effects_predict_what_few_trials_do_not_show() -> None:
    rows = drawn(80, 3)
    loss = ENCODING.summed(effects(), LEAST_SHARE)[rows].sum(1)[:, :1]
    errors = [
        np.abs(fitted(rows[:10], 3 * loss[:10], told).predict(rows[20:]).mean - 3 * loss[20:]).mean()
        for told in (effects(), {})
    ]
    assert errors[0] < 0.5 * errors[1]


def test_wrong_effects_are_outvoted() -> None:
    """Effects that have nothing to do with the losses cost little accuracy once there are trials."""
    rows = drawn(200, 4)
    losses = np.random.default_rng(4).standard_normal(ENCODING.size)[rows].sum(1, keepdims=True)
    errors = [
        np.abs(fitted(rows[:120], losses[:120], told).predict(rows[120:]).mean - losses[120:]).mean()
        for told in (effects(), {})
    ]
    assert errors[0] < 1.2 * errors[1] + 0.05


def test_it_passes_through_what_it_knows_and_doubts_what_is_far() -> None:
    rows = drawn(60, 5)
    losses = np.sin(rows.sum(1, keepdims=True) / 5.0)
    fit = fitted(rows[:40], losses[:40])
    near, far = fit.predict(rows[:40]), fit.predict(rows[40:])
    assert np.abs(near.mean - losses[:40]).mean() < 0.5 * np.abs(far.mean - losses[40:]).mean()
    assert far.deviation.mean() > near.deviation.mean()


def test_what_it_doubts_covers_what_comes() -> None:
    """Of unseen candidates of a sum with interactions and noise, nearly all lie within three deviations."""
    rng = np.random.default_rng(6)
    rows = drawn(300, 6)
    worth, pairs = rng.standard_normal(ENCODING.size), 0.3 * rng.standard_normal((ENCODING.size, ENCODING.size))
    losses = np.array([worth[r].sum() + np.triu(pairs[np.ix_(r, r)], 1).sum() for r in rows])[:, None]
    fit = fitted(rows[:100], losses[:100])
    found = fit.predict(rows[100:])
    within = np.abs(found.mean - losses[100:]) <= 3 * found.deviation
    assert within.mean() > 0.9


def test_what_borders_cost_is_learned_from_few_trials_that_have_them() -> None:
    """No sum of single choices tells it: a layer in float costs two borders, its neighbour then none."""
    rows = drawn(60, 5)
    losses = ENCODING.borders(rows)[:, None]
    fit = fitted(rows[:30], losses[:30])
    assert fit.predict(rows[30:]).mean == pytest.approx(losses[30:], abs=0.5)
    inside = ENCODING.rows([SPACE.uniform("w8a8")])
    scores = fit.single(np.ones((1, 1)), inside)
    best = ENCODING.values(ENCODING.best(scores, ENCODING.numbers([SPACE.uniform("w8a8")]))[0])
    assert SPACE.decode(best).layers.keys() == SPACE.decode(SPACE.uniform("w8a8")).layers.keys()

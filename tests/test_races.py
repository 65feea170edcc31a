"""Properties of scoring a part of validation first."""

from pathlib import Path

import numpy as np
import pytest

from autocompress.core.front import Rival
from autocompress.races import PART, Race
from autocompress.task import hits

ITEMS, CLASSES = 4000, 4
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES, ITEMS)


def outputs(wrong: float, seed: int = 1) -> np.ndarray:
    """Scores that miss that share of the items."""
    rng = np.random.default_rng(seed)
    answers = np.where(rng.random(ITEMS) < wrong, (LABELS + 1) % CLASSES, LABELS)
    return np.eye(CLASSES, dtype=np.float32)[answers]


@pytest.fixture
def race(tmp_path: Path) -> Race:
    inputs = tmp_path / "validation"
    inputs.mkdir()
    np.save(inputs / "x.npy", np.arange(ITEMS))
    return Race(inputs, hits, outputs(0.05), LABELS)


def rows(race: Race) -> np.ndarray:
    return np.load(race.inputs / "x.npy")


def rival(ratio: float, accuracy: float) -> Rival:
    return Rival(ratio=ratio, ratio_ci=(ratio * 0.98, ratio * 1.02), accuracy=accuracy)


def test_the_part_is_spread_over_all_items_and_lies_beside_them(race: Race) -> None:
    part = rows(race)
    assert len(part) == PART
    assert (part[0], part[-1]) == (0, ITEMS - 1)
    assert np.ptp(np.diff(part)) <= 1


def test_what_is_much_worse_than_a_faster_rival_is_stopped_with_what_was_seen(race: Race) -> None:
    got = outputs(0.4, seed=2)
    found = race.judge(got[rows(race)], (0.49, 0.51), [rival(0.4, 0.9)])
    assert found is not None
    assert found.items == PART
    assert found.interval[0] < found.accuracy < found.interval[1] < 0.9
    whole = float(hits(got, LABELS).mean())
    assert found.accuracy == pytest.approx(whole, abs=0.06)


def test_what_may_be_as_good_or_has_only_slower_rivals_is_scored_in_full(race: Race) -> None:
    part = rows(race)
    assert race.judge(outputs(0.06, seed=3)[part], (0.49, 0.51), [rival(0.4, 0.95)]) is None
    bad = outputs(0.4, seed=2)[part]
    assert race.judge(bad, (0.49, 0.51), [rival(0.6, 0.9)]) is None
    assert race.judge(bad, (0.49, 0.51), [rival(0.5, 0.9)]) is None
    assert race.judge(bad, (0.49, 0.51), []) is None


def test_items_that_all_agree_are_no_certainty(race: Race) -> None:
    same = outputs(0.05)
    assert race.judge(same[rows(race)], (0.49, 0.51), [rival(0.4, 0.951)]) is None


def test_a_point_that_is_no_worse_is_stopped_less_than_once_in_a_hundred(race: Race) -> None:
    """The rival has exactly the accuracy that the candidate has on all items."""
    part, stopped = rows(race), 0
    for seed in range(300):
        got = outputs(0.08, seed=100 + seed)
        true = float(hits(got, LABELS).mean())
        stopped += race.judge(got[part], (0.49, 0.51), [rival(0.4, true)]) is not None
    assert stopped <= 3

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.core.errors import StageError
from autocompress.scoring import PairedBootstrap, read_outputs, take

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 400)


def outputs(wrong: int, seed: int = 0) -> Any:
    """Logits that miss the label of so many items, the first ones of an order by seed."""
    logits = np.eye(10, dtype=np.float32)[LABELS]
    missed = np.random.default_rng(seed).permutation(len(LABELS))[:wrong]
    logits[missed] = np.roll(logits[missed], 1, axis=1)
    return logits


def top1(logits: Any, labels: Any) -> float:
    return float((logits.argmax(1) == labels).mean())


def test_outputs_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    for name in ("b", "a"):
        np.save(tmp_path / f"{name}.npy", np.full(3, ord(name), np.float32))
    found = read_outputs(tmp_path, ("b", "a"))
    assert list(found) == ["b", "a"]
    assert found["a"][0] == ord("a")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_fail_by_name(tmp_path: Path, value: float) -> None:
    np.save(tmp_path / "logits.npy", np.array([1.0, value], np.float32))
    with pytest.raises(StageError, match="output 'logits' holds NaN or infinite values") as caught:
        read_outputs(tmp_path, ("logits",))
    assert caught.value.stage == "score"


def test_outputs_of_integers_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "classes.npy", np.arange(3))
    assert read_outputs(tmp_path, ("classes",))["classes"].tolist() == [0, 1, 2]


def test_the_reference_itself_has_no_interval_around_its_score() -> None:
    made = PairedBootstrap(top1, outputs(40), LABELS, len(LABELS))
    assert made.interval(outputs(40)) == (0.9, 0.9)
    assert made.reason is None


def test_a_share_of_hits_is_at_most_all_of_them() -> None:
    def hits(logits: Any, labels: Any) -> Any:
        return (logits.argmax(1) == labels).astype(np.float64)

    few, none = outputs(2), outputs(0)
    beyond = PairedBootstrap(top1, few, LABELS, len(LABELS)).interval(none)
    within = PairedBootstrap(top1, few, LABELS, len(LABELS), hits).interval(none)
    assert beyond is not None
    assert beyond[1] > 1
    assert within == (beyond[0], 1.0)


@pytest.mark.parametrize("wrong", [40, 60, 120])
def test_interval_holds_the_score(wrong: int) -> None:
    low, high = PairedBootstrap(top1, outputs(40), LABELS, len(LABELS)).interval(outputs(wrong)) or (0, 0)
    assert low <= 1 - wrong / 400 <= high
    assert high - low < 0.12


def test_items_that_both_miss_do_not_widen_the_interval() -> None:
    made = PairedBootstrap(top1, outputs(120), LABELS, len(LABELS))
    same_items, other_items = made.interval(outputs(124)), made.interval(outputs(124, seed=1))
    assert same_items is not None
    assert other_items is not None
    assert same_items[1] - same_items[0] < 0.5 * (other_items[1] - other_items[0])


def test_interval_is_the_same_each_time() -> None:
    made = [PairedBootstrap(top1, outputs(40), LABELS, len(LABELS)).interval(outputs(60, 1)) for _ in range(2)]
    assert made[0] == made[1]


def test_interval_covers_the_true_difference_in_95_of_100_data_sets() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(60):
        targets = np.zeros(300)
        one, other = rng.normal(0.5, 1, 300), rng.normal(0.3, 1, 300)
        made = PairedBootstrap(lambda o, _: float(o.mean()), one, targets, 300)
        low, high = made.interval(other) or (0, 0)
        hits.append(low - one.mean() <= -0.2 <= high - one.mean())
    assert np.mean(hits) >= 0.85


def test_a_slow_metric_has_a_reason_in_place_of_an_interval() -> None:
    calls = []

    def slow(logits: Any, labels: Any) -> float:
        calls.append(1)
        time.sleep(0.02)
        return top1(logits, labels)

    made = PairedBootstrap(slow, outputs(40), LABELS, len(LABELS))
    assert made.interval(outputs(40)) is None
    assert made.reason is not None
    assert "the metric takes" in made.reason
    assert "an interval needs 100 calls" in made.reason
    assert len(calls) == 1


def test_items_are_taken_from_every_array_of_a_tree() -> None:
    items = np.array([2, 0, 2])
    tree = {"a": np.arange(3), "b": (np.arange(3) * 10, [np.arange(6).reshape(3, 2)])}
    taken = take(tree, items)
    assert taken["a"].tolist() == [2, 0, 2]
    assert taken["b"][0].tolist() == [20, 0, 20]
    assert taken["b"][1][0].tolist() == [[4, 5], [0, 1], [4, 5]]

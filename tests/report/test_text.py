"""Words about figures say no more than the intervals do."""

import dataclasses

import pytest

from autocompress.core.front import Front
from autocompress.report import text
from tests import made


def test_faster_is_said_only_where_intervals_part() -> None:
    slow = made.score(0.9, 0.5)
    assert text.compared(text.against(made.score(0.9, 0.4), slow)) == "1.25x faster"
    assert text.compared(text.against(made.score(0.9, 0.4, half=0.3), slow)) == "1.25x even"
    assert text.compared(text.against(made.score(0.9, 0.8), slow)) == "0.62x slower"


def test_against_fp32_the_interval_has_to_leave_one_out() -> None:
    assert text.compared(text.against_fp32(made.score(0.9, 0.5))) == "2.00x faster"
    assert text.compared(text.against_fp32(made.score(0.9, 0.99))) == "1.01x even"


def test_nothing_to_compare_with_is_not_a_number() -> None:
    assert text.compared(None) == "n/a"


def test_the_verdict_names_the_fastest_winner_within_a_point() -> None:
    said = text.verdict(Front.of(made.trials()))
    assert said.startswith("Trial 2 is the fastest within 1 point of fp32's accuracy: 0.400 [0.392, 0.408] ms")
    assert "1.25x faster than uniform-int8" in said
    assert "2.50x faster against fp32, 0.50 points lost" in said


def test_a_point_that_beats_uniform_int8_and_not_fp32_is_named_with_both() -> None:
    trials = [
        made.trials()[0],
        made.trial(1, made.score(0.94, 1.5), "uniform-int8"),
        made.trial(2, made.score(0.96, 1.01)),
    ]
    said = text.verdict(Front.of(trials))
    assert "1.49x faster than uniform-int8" in said
    assert "0.99x even against fp32, 1.00 points gained" in said


def test_the_verdict_says_so_when_fp32_itself_is_faster() -> None:
    trials = [
        made.trials()[0],
        made.trial(1, made.score(0.94, 1.5), "uniform-int8"),
        made.trial(2, made.score(0.96, 1.2)),
    ]
    said = text.verdict(Front.of(trials))
    assert said.startswith(
        "Trial 2 is the fastest candidate within 1 point of fp32's accuracy, and fp32 itself is faster"
    )
    assert "0.83x slower against fp32" in said


def test_the_verdict_says_so_when_intervals_overlap() -> None:
    trials = [*made.trials()[:2], made.trial(2, made.score(0.945, 0.48, half=0.05))]
    assert text.verdict(Front.of(trials)).startswith("No point within 1 point of fp32's accuracy is faster")


def test_the_verdict_counts_neither_a_baseline_nor_a_point_that_loses_more() -> None:
    trials = [*made.trials()[:2], made.trials()[3]]
    assert text.verdict(Front.of(trials)).startswith("No point within 1 point")


def test_the_verdict_names_a_missing_baseline() -> None:
    said = text.verdict(Front.of([made.trials()[0], made.trials()[2]]))
    assert said == "Nothing is said about speed against uniform-int8: this run has no uniform-int8 baseline."


def test_layers_that_ran_otherwise_are_counted_beside_what_was_chosen() -> None:
    assert text.described(made.trials()[3]) == "1 × w8a8 (1 layer ran otherwise)"
    assert text.described(made.trials()[2]) == "1 × w8a8"


def test_half_precision_is_told() -> None:
    half = dataclasses.replace(made.trials()[2].candidate, float_precision="bf16")
    assert text.described(dataclasses.replace(made.trials()[2], candidate=half)) == "1 × w8a8, the rest bf16"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "n/a"), (999, "999 B"), (81_234, "81.2 kB"), (999_999, "1.00 MB"), (12_300_000, "12.3 MB")],
)
def test_sizes_keep_three_digits(value: int | None, shown: str) -> None:
    assert text.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.25, "0.25 s"), (119.6, "120 s"), (150.0, "2.5 min"), (9000.0, "2.5 h")]
)
def test_durations_take_the_unit_that_suits(value: float, shown: str) -> None:
    assert text.seconds(value) == shown


def test_many_names_are_cut_short() -> None:
    assert text.listed(["a", "b", "c"], most=2) == "a, b and 1 more"

"""Statistics of measurements."""

import math

import numpy as np
import pytest

from autocompress.core.errors import InputError
from autocompress.core.measurement import (
    DRIFT_FLOOR,
    Measurement,
    MeasurePlan,
    half_width,
    log_ratio,
    lower_quartile,
    merge,
    separated,
    trimmed_mean,
)


def measurement(ratios: list[float]) -> Measurement:
    """Blocks of three samples with these ratios to a reference of 1 ms."""
    return Measurement(
        artifact_sha256="a",
        reference_sha256="r",
        samples=tuple((r,) * 3 for r in ratios),
        reference=((1.0,) * 3,) * len(ratios),
        processes=(0,) * len(ratios),
        clock="wall",
        plan=MeasurePlan(),
    )


def test_a_disturbance_of_fewer_than_three_in_four_samples_does_not_move_a_block() -> None:
    quiet, disturbed = [1.0] * 8, [1.0, 9.0] * 4
    assert log_ratio(disturbed, quiet) == log_ratio(quiet, disturbed) == 0.0


def test_lower_quartile_is_at_rank_of_a_quarter() -> None:
    assert lower_quartile([4.0, 1.0, 3.0]) == 1.0  # rank 1
    assert lower_quartile([5.0, 1.0, 2.0, 3.0, 4.0]) == 1.5  # rank 1.5
    assert lower_quartile([7.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 2.0  # rank 2
    assert lower_quartile([2.0]) == lower_quartile([3.0, 2.0]) == 2.0


def test_half_width_is_students() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert half_width([1.0]) == math.inf


def test_a_few_wild_blocks_hardly_move_centre_or_interval() -> None:
    calm = [0.01 * (i % 5) for i in range(20)]
    wild = [*calm[:-2], 5.0, -5.0]
    assert trimmed_mean(wild) == pytest.approx(trimmed_mean(calm), abs=0.005)
    assert half_width(wild) < 1.5 * half_width(calm)


@pytest.mark.parametrize("blocks", [8, 12, 30])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    draws = rng.normal(0.0, 1.0, (2000, blocks))
    held = np.mean([abs(trimmed_mean(row)) <= half_width(row) for row in draws.tolist()])
    assert 0.93 <= held <= 0.97


def test_ratio_is_that_of_most_blocks_and_its_interval_has_the_drift_on_top() -> None:
    found = measurement([0.5, 0.5, 0.5, 0.9])
    assert found.ratio == pytest.approx(0.5)
    half = half_width(found.log_ratios) + DRIFT_FLOOR
    assert found.ratio_ci == pytest.approx((0.5 * math.exp(-half), 0.5 * math.exp(half)))
    steady = measurement([0.5] * 3)
    assert steady.ratio_ci == pytest.approx((0.5 * math.exp(-DRIFT_FLOOR), 0.5 * math.exp(DRIFT_FLOOR)))


def test_an_interval_covers_every_process_it_was_measured_in() -> None:
    found = merge([measurement([0.5] * 50), measurement([0.8] * 50)])
    assert found.processes == (0,) * 50 + (1,) * 50
    assert found.ratio == pytest.approx(math.sqrt(0.5 * 0.8))
    low, high = found.ratio_ci
    assert low <= 0.5 < 0.8 <= high


def test_faster_is_said_of_separated_intervals_only() -> None:
    assert separated((0.5, 0.6), (0.7, 0.8))
    assert not separated((0.5, 0.7), (0.7, 0.8))
    assert not separated((0.7, 0.8), (0.5, 0.6))


@pytest.mark.parametrize(
    ("ratios", "message"), [([1.0, 1.0], "at least 3 blocks, got 2"), ([1.0, 0.0, 1.0], "positive durations")]
)
def test_what_is_no_measurement_is_refused(ratios: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measurement(ratios)

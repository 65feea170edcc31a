"""Properties of the latencies that a search remembers, and of when it measures again."""

import math
from dataclasses import replace

import pytest

from autocompress.core.front import Rival
from autocompress.core.measurement import Measurement
from autocompress.latencies import MOST_PARTS, Latencies, Latency, undecided
from tests.scripted import measurement


def noisy(ratio: float, noise: float = 0.0) -> Measurement:
    """Blocks whose ratios lie evenly around `ratio`."""
    plain = measurement(ratio)
    factors = [math.exp(noise * (i - 3.5) / 3.5) for i in range(8)]
    return replace(plain, samples=tuple(tuple(ratio * f for _ in range(3)) for f in factors))


def latency(ratio: float, noise: float = 0.0) -> Latency:
    return Latency(parts=(noisy(ratio, noise),), executed={}, diagnosis={})


def rival(ratio: float, accuracy: float, half: float = 0.01) -> Rival:
    return Rival(ratio=ratio, ratio_ci=(ratio * (1 - half), ratio * (1 + half)), accuracy=accuracy)


def race(ratio: float, accuracy: float, rivals: list[Rival], noise: float = 0.05, then: float | None = None) -> int:
    """How often a file was measured again."""
    known, count = Latencies(), 0
    known.take_up("key", latency(ratio, noise))

    def measure() -> Measurement:
        nonlocal count
        count += 1
        return noisy(ratio if then is None else then, noise)

    assert known.race("key", accuracy, rivals, measure) == (count > 0)
    assert len(known["key"].parts) == 1 + count
    return count


def test_a_file_that_is_clearly_apart_or_alone_is_measured_once() -> None:
    assert race(0.5, 0.9, []) == 0
    assert race(0.5, 0.9, [rival(0.8, 0.95), rival(0.2, 0.7)]) == 0


def test_a_file_near_a_rival_is_measured_again_a_few_times_at_most() -> None:
    assert race(0.5, 0.9, [rival(0.505, 0.91)]) == MOST_PARTS - 1


def test_what_a_faster_and_better_rival_dominates_is_not_worth_it() -> None:
    assert race(0.5, 0.9, [rival(0.505, 0.91), rival(0.3, 0.9)]) == 0
    assert race(0.5, 0.9, [rival(0.505, 0.91), rival(0.3, 0.89)]) == MOST_PARTS - 1


def test_measuring_ends_as_soon_as_intervals_part() -> None:
    close = [rival(0.53, 0.91)]
    assert undecided(latency(0.5, 0.07), 0.9, close)
    assert race(0.5, 0.9, close, noise=0.07) == 1


def test_equal_kernels_share_a_latency_and_nothing_parts_them() -> None:
    own = latency(0.5, 0.05)
    same = Rival(ratio=own.ratio, ratio_ci=own.ratio_ci, accuracy=0.95)
    assert not undecided(own, 0.9, [same])


def test_parts_are_one_measurement_whose_interval_covers_them_all() -> None:
    both = Latency(parts=(noisy(0.5), noisy(0.52)), executed={}, diagnosis={})
    assert both.ratio == pytest.approx(math.sqrt(0.5 * 0.52))
    assert both.ratio_ci[0] <= 0.5
    assert both.ratio_ci[1] >= 0.52
    assert len(both.measurement.samples) == 16


def test_of_two_records_the_longer_one_is_kept() -> None:
    known = Latencies()
    long = Latency(parts=(noisy(0.5), noisy(0.52)), executed={}, diagnosis={})
    known.take_up("key", long)
    assert known.take_up("key", latency(0.4)) == long
    assert "key" in known
    assert "other" not in known

"""The timing loop, exact on a clock that moves only when a call does."""

import gc
import math
from collections.abc import Callable

import pytest

from autocompress.core.measurement import MeasurePlan, half_width
from autocompress.device.timing import SAMPLE_NS, clock_name, interleave, order
from tests.fakes import FakeClock

MS = 1_000_000


class Script:
    """Calls that take a set time on the clock, and the record of who was called."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.calls: list[str] = []

    def call(self, name: str, duration: Callable[[int], int] | int) -> Callable[[], None]:
        count = 0

        def run() -> None:
            nonlocal count
            self.calls.append(name)
            self.clock.advance(duration(count) if callable(duration) else duration)
            count += 1

        return run


def plan(**values: float) -> MeasurePlan:
    defaults = {"warmup_runs": 1, "warmup_s": 0.0, "turn_s": 0.003, "min_blocks": 3, "max_duration_s": 60.0}
    return MeasurePlan(**{**defaults, **values})  # type: ignore[arg-type]


def test_order_is_a_palindrome_that_starts_one_further_each_block() -> None:
    assert order(3, 0) == [0, 1, 2, 2, 1, 0]
    assert order(3, 1) == [1, 2, 0, 0, 2, 1]
    assert order(3, 3) == order(3, 0)
    assert order(1, 5) == [0, 0]


def test_artifacts_take_turns_and_each_turn_discards_its_first_call() -> None:
    script = Script()
    calls = [script.call("a", 1 * MS), script.call("b", 3 * MS)]
    blocks = interleave(calls, plan(), script.clock)
    a, b = ["a"] * 4, ["b"] * 2  # one call discarded, then 3 ms of samples
    assert script.calls == ["a", "b", *a, *b, *b, *a, *b, *a, *a, *b, *a, *b, *b, *a]
    assert blocks == [((1.0,) * 6, (3.0,) * 2)] * 3


def test_samples_are_milliseconds_per_call_without_the_discarded_ones() -> None:
    script = Script()
    # Cold caches: the first call of each turn of four takes ten times as long.
    call = script.call("a", lambda n: 10 * MS if n in range(1, 100, 4) else 1 * MS)
    blocks = interleave([call], plan(), script.clock)
    assert {sample for block in blocks for sample in block[0]} == {1.0}


def test_short_calls_are_batched_into_samples_that_are_long_against_the_clock() -> None:
    script = Script()
    duration = 16_000
    blocks = interleave([script.call("a", duration)], plan(turn_s=0.001), script.clock)
    repeats = round(SAMPLE_NS / duration)
    samples_a_turn = -(-MS // (repeats * duration))
    assert blocks == [((duration / MS,) * (2 * samples_a_turn),)] * 3
    assert len(script.calls) == 1 + 3 * 2 * (1 + samples_a_turn) * repeats


def test_warm_up_ends_when_both_minimums_are_met() -> None:
    for minimums, runs in (({"warmup_runs": 7, "warmup_s": 0.002}, 7), ({"warmup_runs": 2, "warmup_s": 0.0095}, 10)):
        script = Script()
        interleave([script.call("a", MS), script.call("b", MS)], plan(**minimums), script.clock)
        assert script.calls[: 2 * runs] == ["a"] * runs + ["b"] * runs
        assert len(script.calls) == 2 * runs + 3 * 4 * 4


def test_stops_after_the_fewest_blocks_when_every_ratio_is_known() -> None:
    script = Script()
    blocks = interleave([script.call("a", MS), script.call("b", MS)], plan(min_blocks=5), script.clock)
    assert len(blocks) == 5


def test_goes_on_while_one_ratio_is_wide_and_stops_at_the_maximum() -> None:
    script = Script()
    noisy = script.call("b", lambda n: MS * (1 + n // 8 % 2))  # twice as slow in every other block
    steady = [script.call("a", MS), script.call("c", MS)]
    blocks = interleave([steady[0], noisy, steady[1]], plan(max_duration_s=1.0), script.clock)
    begin = 3 * MS
    length = [sum(sum(samples) for samples in block) * MS * 4 / 3 for block in blocks]
    assert sum(length[:-1]) < 1e9 <= script.clock.now_ns - begin


def test_stops_as_soon_as_the_interval_is_narrow_enough() -> None:
    script = Script()
    settling = script.call("b", lambda n: MS * 2 if 1 <= n < 7 else MS)  # the first block is off: log ratio 0.693
    found = interleave([script.call("a", MS), settling], plan(target_ci=0.1, max_duration_s=1e6), script.clock)
    widths = [half_width([math.log(2), *[0.0] * (n - 1)]) for n in (len(found) - 1, len(found))]
    assert widths[0] > 0.1 >= widths[1]


def test_never_fewer_than_three_blocks() -> None:
    script = Script()
    blocks = interleave(
        [script.call("a", 900 * MS), script.call("b", 900 * MS)], plan(max_duration_s=0.1), script.clock
    )
    assert len(blocks) == 3


def test_garbage_is_not_collected_while_timing_and_is_again_afterwards() -> None:
    script = Script()
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        script.clock.advance(MS)
        if len(seen) > 5:
            raise RuntimeError

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        interleave([call], plan(), script.clock)
    assert gc.isenabled()
    assert not any(seen)


def test_processor_time_is_the_clock_for_one_thread_only() -> None:
    assert clock_name(plan()) == "process_cpu"
    assert clock_name(MeasurePlan(threads=2)) == "wall"
    assert clock_name(MeasurePlan(clock="wall")) == "wall"

"""The one timing loop: artifacts take turns in blocks, so that what slows the machine slows all of them.

::

    warm-up of each │ block 0: A B C C B A │ block 1: B C A A C B │ block 2: …
                      each turn: discarded calls, then samples for `turn_s`

A palindrome cancels a drift that is linear in time, the rotation of its start cancels the advantage of a position.
In each turn the first calls are discarded: they pay for caches that the artifact before has filled.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Literal

from autocompress.core.measurement import MeasurePlan, half_width, log_ratio

Call = Callable[[], object]
Clock = Callable[[], int]
Block = tuple[tuple[float, ...], ...]
ClockName = Literal["process_cpu", "wall"]

# Reading the process-CPU clock is a system call of about 0.8 µs: a sample this long hides it below 0.5 %.
SAMPLE_NS = 200_000
FEWEST_BLOCKS = 3

CLOCKS: dict[ClockName, Clock] = {"process_cpu": time.process_time_ns, "wall": time.perf_counter_ns}


def clock_name(plan: MeasurePlan) -> ClockName:
    """The clock for a plan: process CPU time is the latency only while one thread of the processor works."""
    return plan.clock or ("process_cpu" if plan.threads == 1 else "wall")


def interleave(calls: Sequence[Call], plan: MeasurePlan, clock: Clock) -> list[Block]:
    """Time all `calls`, the first being the reference, until the plan is met.

    Ends after the block in which `min_blocks` are there and the 95 % interval of each call's ratio to the reference
    is within `target_ci`, or in which `max_duration_s` is reached, which is
    once for every four calls beside the reference (warm-up not counted, never fewer than 3 blocks).

    Args:
        clock: nanoseconds; all durations of the plan are told by it.

    Returns:
        One entry a block; in it, for each call, its samples in milliseconds per call.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = [max(1, round(SAMPLE_NS / _warm_up(call, plan, clock))) for call in calls]
        blocks: list[Block] = []
        begin = clock()
        while not done(blocks, plan, clock() - begin):
            blocks.append(_block(calls, repeats, len(blocks), plan, clock))
        return blocks
    finally:
        if collecting:
            gc.enable()


def order(count: int, block: int) -> list[int]:
    """Whose turn it is, in turn: a palindrome that starts one further in each block."""
    forth = [(block + i) % count for i in range(count)]
    return forth + forth[::-1]


def _warm_up(call: Call, plan: MeasurePlan, clock: Clock) -> int:
    """Run until both minimums are met; the shortest duration seen, nanoseconds."""
    begin, runs, shortest = clock(), 0, 0
    while runs < plan.warmup_runs or clock() - begin < plan.warmup_s * 1e9:
        start = clock()
        call()
        took = max(1, clock() - start)
        shortest, runs = min(shortest or took, took), runs + 1
    return shortest


def _block(calls: Sequence[Call], repeats: Sequence[int], number: int, plan: MeasurePlan, clock: Clock) -> Block:
    samples: list[list[float]] = [[] for _ in calls]
    for i in order(len(calls), number):
        samples[i] += _turn(calls[i], repeats[i], plan, clock)
    return tuple(tuple(s) for s in samples)


def _turn(call: Call, repeats: int, plan: MeasurePlan, clock: Clock) -> list[float]:
    for _ in range(repeats):
        call()
    samples: list[float] = []
    begin = stop = clock()
    while stop - begin < plan.turn_s * 1e9:
        start = clock()
        for _ in range(repeats):
            call()
        stop = clock()
        if stop > start:  # the process-CPU clock of a virtual machine may stand still or step back once in a while
            samples.append((stop - start) / repeats / 1e6)
    return samples


def done(blocks: Sequence[Block], plan: MeasurePlan, elapsed_ns: int) -> bool:
    """Whether the plan is met, `elapsed_ns` after the first block began."""
    if len(blocks) < FEWEST_BLOCKS:
        return False
    if elapsed_ns >= plan.max_duration_s * 1e9 * max(1.0, (len(blocks[0]) - 1) / 4):
        return True
    return len(blocks) >= plan.min_blocks and all(
        half_width([log_ratio(block[i], block[0]) for block in blocks]) <= plan.target_ci
        for i in range(1, len(blocks[0]))
    )

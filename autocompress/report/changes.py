"""A second measurement beside the first one, for people."""

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table

from autocompress.remeasure import changed
from autocompress.report.table import PIPED_WIDTH
from autocompress.reprofile import Figures, PickCheck, Point, Reprofile

HEADS = (
    "Trial",
    "What",
    "vs fp32 recorded",
    "vs fp32 now",
    "Latency now, ms",
    "Accuracy recorded",
    "Accuracy now",
    "Front",
)


def print_changes(result: Reprofile, out: TextIO | None = None) -> None:
    """Print what changed: machine, every point, rank correlation, the front, the pick."""
    stream = out if out is not None else sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else PIPED_WIDTH, no_color=not terminal, highlight=False)
    table = Table()
    for title in HEADS:
        table.add_column(title, overflow="fold")
    for point in result.points:
        table.add_row(*_cells(point))
    target = result.target if result.target == result.target_now else f"{result.target}, now {result.target_now}"
    tau = "there is none, fewer than two latencies differ" if result.tau is None else f"{result.tau:.2f}"
    head = (f"{result.source} on {target}, {result.fingerprint}", f"Machine: {changed(result.machine) or 'the same'}.")
    tail = (
        f"Accuracy: {result.accuracy}.",
        f"Rank correlation of the latencies (Kendall's tau): {tau}.",
        f"Entered the front: {_numbers(result.entered)}. Left it: {_numbers(result.left)}.",
        _pick(result.pick),
    )
    for line in head:
        console.print(line, markup=False, soft_wrap=True)
    console.print(table)
    for line in tail:
        console.print(line, markup=False, soft_wrap=True)


def _cells(point: Point) -> tuple[str, ...]:
    front = {(True, True): "stays", (True, False): "left", (False, True): "entered", (False, False): ""}
    what = "" if point.role == "candidate" else point.role
    now = point.now
    return (
        str(point.trial),
        what,
        _ratio(point.recorded),
        f"fails: {point.failure}" if now is None else _ratio(now),
        "" if now is None else f"{now.latency_ms:.3g}",
        f"{point.recorded.accuracy:.4f}",
        "" if now is None else f"{now.accuracy:.4f}",
        front[point.on_front, point.on_front_now],
    )


def _ratio(figures: Figures) -> str:
    low, high = figures.ratio_ci
    return f"{1 / figures.ratio:.2f}x [{1 / high:.2f}, {1 / low:.2f}]"


def _numbers(trials: tuple[int, ...]) -> str:
    return ", ".join(f"trial {n}" for n in trials) or "none"


def _pick(check: PickCheck | None) -> str:
    if check is None:
        return "Nothing was picked from this run."
    limits = ", ".join(f"{name} = {value:g}" for name, value in check.limits.items())
    asked = f"its limits ({limits})" if limits else "its place on the front"
    if check.holds:
        return f"The pick, trial {check.trial}, holds {asked}."
    return f"The pick, trial {check.trial}, no longer holds {asked}: {'; '.join(check.broken)}."

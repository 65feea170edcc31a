"""The front as a table for people, on a terminal or piped into a file."""

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from autocompress.core.front import Front
from autocompress.core.trial import Trial
from autocompress.report import text

PIPED_WIDTH = 220
HEADS = ("Trial", "Accuracy", "Drop", "Test", "Latency, ms", "vs fp32", "vs int8", "Size", "Memory", "On front", "What")
_LEFT = ("Trial", "What")


def rows(front: Front) -> list[tuple[str, ...]]:
    """Cells as text under HEADS: the baselines, then the front from the fastest point on."""
    on_front = {t.number for t in front.points}
    beside = [t for t in front.baselines.values() if t.number not in on_front]
    return [_cells(trial, front) for trial in (*beside, *front.points)]


def print_front(front: Front, title: str, footer: Sequence[str], out: TextIO | None = None) -> None:
    """Print the table: in the terminal's width and colours, or at full width and plain when piped."""
    stream = out if out is not None else sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else PIPED_WIDTH, no_color=not terminal, highlight=False)
    table = Table(title=title, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in _LEFT else "right", overflow="fold")
    beside = len(front.baselines.keys() - {t.role for t in front.points})
    for i, cells in enumerate(rows(front)):
        style = "green" if "faster" in cells[HEADS.index("vs int8")] else None
        table.add_row(*cells, style=style, end_section=i == beside - 1)
    console.print(table)
    for sentence in footer:
        console.print(sentence, markup=False, soft_wrap=True)


def _cells(trial: Trial, front: Front) -> tuple[str, ...]:
    score = trial.score
    assert score is not None
    fp32, int8 = text.baseline(front, "fp32"), text.baseline(front, "uniform-int8")
    lost = text.drop(score, fp32)
    probability = front.probability.get(trial.number)
    return (
        str(trial.number),
        text.accuracy(score),
        "n/a" if lost is None else f"{lost:+.2f}",
        "n/a" if score.test_accuracy is None else f"{score.test_accuracy:.4f}",
        text.latency(score),
        text.compared(text.against_fp32(score)),
        "1" if trial.role == "uniform-int8" else text.compared(text.against(score, int8) if int8 else None),
        text.size(score.size_bytes),
        text.size(score.peak_memory_bytes),
        "n/a" if probability is None else f"{probability:.0%}",
        text.described(trial) + (f" ≈ {', '.join(map(str, ties))}" if (ties := front.ties.get(trial.number)) else ""),
    )

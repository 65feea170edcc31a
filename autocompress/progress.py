"""What a search shows while it runs: a live view on a terminal, a line now and then elsewhere, always on stderr."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from autocompress.core.measurement import separated
from autocompress.core.trial import Failure, Score, Trial

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_EVERY_S = 5.0
TRAINING_S = 10.0
SHOWN_POINTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a search stands.

    Attributes:
        done, failures: finished trials of the record, by any worker.
        budget: trials at which it ends; None where only time ends it.
        eta_s: seconds left at the present pace; None while that is not known.
        front: non-dominated trials, fastest first.
        baselines: scores by role.
    """

    done: int
    failures: int
    budget: int | None
    elapsed_s: float
    eta_s: float | None
    front: tuple[Trial, ...]
    baselines: Mapping[str, Score]


class Progress(Protocol):
    """Told by the search what happens; must return fast and raise nothing."""

    def stage(self, text: str) -> None:
        """Something other than a trial begins."""

    def note(self, text: str) -> None:
        """Something worth knowing, to be read at leisure."""

    def trial(self, trial: Trial, status: Status) -> None:
        """A trial was finished and is in the record."""

    def close(self) -> None:
        """The search is over; called once, also after an error."""


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def trial(self, trial: Trial, status: Status) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing to do."""


class Lines:
    """Plain lines: every stage, every baseline, and the status every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = -LINE_EVERY_S
        self._pending: Status | None = None

    def stage(self, text: str) -> None:
        """One line."""
        self._flush()
        self._print(text)

    def note(self, text: str) -> None:
        """One line."""
        self.stage(text)

    def trial(self, trial: Trial, status: Status) -> None:
        """One line, unless the last one was just now."""
        self._pending = status
        if trial.role != "candidate":
            self._print(f"{trial.role}: {describe(trial.outcome)}")
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self._flush()

    def close(self) -> None:
        """The last status, if it was not shown."""
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            self._last = time.monotonic()
            self._print(headline(self._pending))
            self._pending = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveView:
    """A bar, the counts and the best points so far, redrawn in place by rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._stage = ""
        self._status: Status | None = None
        self._live = Live(console=Console(file=stream), get_renderable=self._render, refresh_per_second=2)
        self._live.start()

    def stage(self, text: str) -> None:
        """Shown below the table until a trial is finished."""
        self._stage = text

    def note(self, text: str) -> None:
        """A line that stays, above the table."""
        self._live.console.print(text, markup=False, highlight=False)

    def trial(self, trial: Trial, status: Status) -> None:
        """Redrawn at the next tick."""
        self._stage = f"last: {trial.number}, {describe(trial.outcome)}"
        self._status = status

    def close(self) -> None:
        """Leave the last picture on the screen."""
        self._live.stop()

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._status is not None:
            parts.append(Text(headline(self._status)))
            if self._status.budget is not None:
                parts.append(ProgressBar(total=self._status.budget, completed=self._status.done, width=60))
            parts.append(_table(self._status))
        if self._stage:
            parts.append(Text(self._stage))
        return Group(*parts)


class Training:
    """Tells a view of a training that is going on, every few seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told = time.monotonic()

    def __call__(self, what: str, step: int, steps: int, loss: float) -> None:
        """After a step."""
        if time.monotonic() - self._told >= TRAINING_S:
            self._told = time.monotonic()
            self._progress.stage(f"{what}: step {step} of {steps}, loss {loss:.3g}")


def open_progress(stream: TextIO | None = None) -> Progress:
    """The live view where `stream` (stderr) is a terminal, else plain lines."""
    target = sys.stderr if stream is None else stream
    return LiveView(target) if target.isatty() else Lines(target)


def describe(outcome: Score | Failure) -> str:
    """An outcome in one short line."""
    if isinstance(outcome, Failure):
        return f"failed in {outcome.stage}: {outcome.message}"
    return f"accuracy {outcome.accuracy:.4f}, {outcome.latency_ms:.4g} ms, {outcome.size_bytes / 1e6:.3g} MB"


def headline(status: Status) -> str:
    """Counts, time and the size of the front in one line."""
    budget = "" if status.budget is None else f"/{status.budget}"
    failures = f", {status.failures} failed" if status.failures else ""
    left = "" if status.eta_s is None else f", about {_duration(status.eta_s)} left"
    return (
        f"trial {status.done}{budget}{failures}, {_duration(status.elapsed_s)}{left}; "
        f"{len(status.front)} points on the front{_lead(status)}"
    )


def _lead(status: Status) -> str:
    """The fastest point that costs at most one point of accuracy, and whether it beats the vendor's default."""
    fp32 = status.baselines.get("fp32")
    if fp32 is None:
        return ""
    close = [s for t in status.front if (s := t.score) and 100 * (fp32.accuracy - s.accuracy) <= 1]
    if not close:
        return ""
    best = min(close, key=lambda s: s.latency_ms)
    vendor = status.baselines.get("uniform-int8")
    beats = vendor is not None and separated(best.ratio_ci, vendor.ratio_ci)
    return f"; {1 / best.ratio:.2f}x of fp32 within one point{', faster than uniform-int8' if beats else ''}"


def _table(status: Status) -> "RenderableType":
    from rich.table import Table

    table = Table("trial", "accuracy", "latency, ms", "× fp32", "MB", box=None, header_style="bold")
    rows = [(name, score) for name, score in status.baselines.items()]
    step = max(1, -(-len(status.front) // SHOWN_POINTS))
    rows += [(str(t.number), t.score) for t in status.front[::step] if t.score is not None]
    for name, score in rows:
        table.add_row(
            name,
            f"{score.accuracy:.4f}",
            f"{score.latency_ms:.4g}",
            f"{1 / score.ratio:.2f}",
            f"{score.size_bytes / 1e6:.3g}",
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

"""Sensitivities as a table and as a picture: what each choice loses, and what it saves."""

import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from autocompress.core.errors import InputError
from autocompress.core.extras import require
from autocompress.core.sensitivity import Effect, Sensitivity
from autocompress.report import text
from autocompress.report.plot import check_path
from autocompress.report.table import PIPED_WIDTH

HEADS = ("Variable", "Choice", "Loss", "Cost")
COLOURS = {
    "layer": "#1b6ca8",
    "precision": "#888888",
    "width": "#d95f02",
    "skip": "#66a61e",
    "heads": "#7570b3",
    "rank": "#e7298a",
    "sparsity": "#a6761d",
}
FLOOR = 1e-6  # losses below are drawn there: a logarithm has no zero


def rows(found: Sensitivity) -> list[tuple[str, ...]]:
    """Cells as text under HEADS of the choices that were probed, variables in order of their largest loss."""
    return [
        (name, choice, f"{effect.loss:.2g}", f"{100 * effect.cost:+.1f} %")
        for name in found.ranked()
        for choice, effect in sorted(found.effects[name].items(), key=lambda item: -item[1].loss)
        if effect.probed
    ]


def print_sensitivity(found: Sensitivity, out: TextIO | None = None) -> None:
    """Print the table, what its figures are, and what was left out."""
    stream = out if out is not None else sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else PIPED_WIDTH, no_color=not terminal, highlight=False)
    table = Table(title=f"{found.task} on {found.target}, one choice at a time", title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in HEADS[:2] else "right", overflow="fold")
    for cells in rows(found):
        table.add_row(*cells)
    console.print(table)
    for sentence in footer(found):
        console.print(sentence, markup=False, soft_wrap=True)


def footer(found: Sensitivity) -> list[str]:
    """What the figures are, in sentences."""
    ratio = found.int8_ratio
    integer = (
        "integer layers by their bits, since no probe of this device says more"
        if ratio is None
        else f"integer layers at the {ratio:.2f} of float that a probe of this device measured"
    )
    return [
        f"{found.probes} probes in {text.seconds(found.seconds)}, on at most {found.items} calibration items.",
        f"Loss: {found.unit} of the outputs from the original's, nothing recovered.",
        f"Cost: share of the multiply-adds, {integer}; it puts choices in order and is no measured latency.",
        *(f"left out: {name}: {why}" for name, why in found.left_out.items()),
    ]


def write_plot(found: Sensitivity, path: Path) -> None:
    """Write the picture: `.html` is self-contained and interactive, `.png` is an image.

    Raises:
        InputError: another suffix, nothing to draw, or a path that cannot be written.
        TargetError: the library that draws is not installed.
    """
    check_path(path)
    if not any(series(found).values()):
        raise InputError("there is nothing to draw: nothing was probed")
    if path.suffix == ".html":
        path.write_text(figure(found).to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
    else:
        _write_png(found, path)


def series(found: Sensitivity) -> dict[str, list[tuple[str, Effect]]]:
    """What was probed, with its name, by kind of variable."""
    kinds: dict[str, list[tuple[str, Effect]]] = {}
    for name, effects in found.effects.items():
        for choice, effect in effects.items():
            if effect.probed:
                kinds.setdefault(name.partition(":")[0], []).append((f"{name} = {choice}", effect))
    return kinds


def figure(found: Sensitivity) -> Any:
    """A plotly figure."""
    go = require("plotly.graph_objects", "report")
    chart = go.Figure()
    for kind, probed in series(found).items():
        chart.add_trace(
            go.Scatter(
                x=[-100 * effect.cost for _, effect in probed],
                y=[max(FLOOR, effect.loss) for _, effect in probed],
                text=[name for name, _ in probed],
                name=kind,
                mode="markers",
                marker={"size": 9, "color": COLOURS[kind]},
                hovertemplate="%{text}<br>saves %{x:.1f} %, loses %{y:.2g}<extra></extra>",
            )
        )
    chart.update_layout(title=_title(found), template="plotly_white", xaxis_title=_across(), yaxis_title=_up(found))
    chart.update_yaxes(type="log")
    return chart


def _write_png(found: Sensitivity, path: Path) -> None:
    backend = require("matplotlib.backends.backend_agg", "report")
    figure_module = require("matplotlib.figure", "report")
    picture = figure_module.Figure(figsize=(9, 6), layout="constrained")
    backend.FigureCanvasAgg(picture)
    axes = picture.subplots()
    for kind, probed in series(found).items():
        xs = [-100 * effect.cost for _, effect in probed]
        axes.scatter(xs, [max(FLOOR, effect.loss) for _, effect in probed], color=COLOURS[kind], label=kind)
    axes.set(title=_title(found), xlabel=_across(), ylabel=_up(found), yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=150)


def _title(found: Sensitivity) -> str:
    return f"{found.task} on {found.target}, one choice at a time"


def _across() -> str:
    return "saved, % of the multiply-adds (no measured latency)"


def _up(found: Sensitivity) -> str:
    return f"loss, {found.unit} of the outputs"

"""The front as a picture: accuracy over latency, with error bars, and the baselines beside it."""

from pathlib import Path
from typing import Any

from autocompress.core.errors import InputError
from autocompress.core.extras import require
from autocompress.core.front import Front
from autocompress.core.trial import Trial
from autocompress.report import text

COLOURS = {
    "fp32": "#888888",
    "uniform-fp16": "#7570b3",
    "uniform-bf16": "#66a61e",
    "uniform-int8": "#d95f02",
    "candidate": "#1b6ca8",
}


def write_plot(front: Front, title: str, path: Path) -> None:
    """Write the picture: `.html` is self-contained and interactive, `.png` is an image.

    Raises:
        InputError: another suffix, an empty front, or a path that cannot be written.
        TargetError: the library that draws is not installed.
    """
    check_path(path)
    if not front.points:
        raise InputError("there is nothing to draw: no trial was scored")
    if path.suffix == ".html":
        path.write_text(figure(front, title).to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
    else:
        _write_png(front, title, path)


def check_path(path: Path) -> None:
    """Say before the work what a picture cannot be written to.

    Raises:
        InputError: another suffix than `.html` or `.png`, or a folder that is not there.
    """
    if path.suffix not in (".html", ".png"):
        raise InputError(f"a picture is written as .html or .png, got {str(path)!r}")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {str(path)!r} does not exist")


def figure(front: Front, title: str) -> Any:
    """A plotly figure."""
    go = require("plotly.graph_objects", "report")
    chart = go.Figure()
    for name, trials in _series(front).items():
        xs, ys, x_minus, x_plus, y_minus, y_plus = _figures(trials)
        chart.add_trace(
            go.Scatter(
                x=xs,
                y=ys,
                name=name,
                mode="lines+markers" if name == "front" else "markers",
                line={"shape": "hv", "width": 1},
                marker={"size": 9, "color": COLOURS.get(name, COLOURS["candidate"])},
                error_x={"type": "data", "symmetric": False, "array": x_plus, "arrayminus": x_minus, "thickness": 1},
                error_y={"type": "data", "symmetric": False, "array": y_plus, "arrayminus": y_minus, "thickness": 1},
                text=[f"trial {t.number}: {text.described(t)}" for t in trials],
                hovertemplate="%{text}<br>%{x:.4g} ms, accuracy %{y:.4f}<extra></extra>",
            )
        )
    chart.update_layout(
        title=title,
        template="plotly_white",
        xaxis_title="latency, ms at batch 1 (95 % interval)",
        yaxis_title="accuracy on validation (95 % interval)",
    )
    return chart


def _write_png(front: Front, title: str, path: Path) -> None:
    backend = require("matplotlib.backends.backend_agg", "report")
    figure_module = require("matplotlib.figure", "report")
    picture = figure_module.Figure(figsize=(9, 6), layout="constrained")
    backend.FigureCanvasAgg(picture)
    axes = picture.subplots()
    for name, trials in _series(front).items():
        xs, ys, x_minus, x_plus, y_minus, y_plus = _figures(trials)
        colour = COLOURS.get(name, COLOURS["candidate"])
        axes.errorbar(xs, ys, xerr=(x_minus, x_plus), yerr=(y_minus, y_plus), fmt="o", color=colour, label=name)
        if name == "front":
            axes.step(xs, ys, where="post", color=colour, linewidth=1)
    axes.set(title=title, xlabel="latency, ms at batch 1 (95 % interval)", ylabel="accuracy on validation")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, dpi=150)


def _series(front: Front) -> dict[str, list[Trial]]:
    """Front members that are candidates, and each baseline by its name."""
    members = [t for t in front.points if t.role == "candidate"]
    return {"front": members, **{role: [t] for role, t in front.baselines.items()}}


def _figures(trials: list[Trial]) -> tuple[list[float], ...]:
    """x, y and the lengths of their error bars down and up; an accuracy without an interval has none."""
    columns: tuple[list[float], ...] = ([], [], [], [], [], [])
    for trial in trials:
        if (score := trial.score) is None:
            continue
        low, high = score.accuracy_ci or (score.accuracy, score.accuracy)
        values = (
            score.latency_ms,
            score.accuracy,
            max(0.0, score.latency_ms - score.latency_ms_ci[0]),
            max(0.0, score.latency_ms_ci[1] - score.latency_ms),
            max(0.0, score.accuracy - low),
            max(0.0, high - score.accuracy),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns

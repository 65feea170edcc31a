"""A picture shows every point with its intervals, and the baselines."""

from pathlib import Path

import pytest

from autocompress.core.errors import InputError
from autocompress.core.front import Front
from autocompress.report.plot import figure, write_plot
from tests import made


def test_every_point_and_baseline_is_drawn_with_error_bars() -> None:
    traces = {trace.name: trace for trace in figure(Front.of(made.trials()), "t").data}
    assert set(traces) == {"front", "fp32", "uniform-int8"}
    assert list(traces["front"].x) == [0.2, 0.4]
    assert list(traces["front"].error_x.array) == pytest.approx([0.004, 0.008])
    assert list(traces["fp32"].error_y.arrayminus) == pytest.approx([0.01])


def test_html_is_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "front.html"
    write_plot(Front.of(made.trials()), "t", path)
    html = path.read_text(encoding="utf-8")
    assert "<script src=" not in html
    assert "plotly" in html


def test_png_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "front.png"
    write_plot(Front.of(made.trials()), "t", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "said"), [("front.pdf", "written as .html or .png"), ("nowhere/f.png", "folder of .* does not exist")]
)
def test_a_path_that_cannot_be_drawn_to_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_plot(Front.of(made.trials()), "t", tmp_path / name)


def test_an_empty_front_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        write_plot(Front.of([]), "t", tmp_path / "f.html")

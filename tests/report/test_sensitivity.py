"""Sensitivities as people see them: what was probed, ranked, and said to be no measurement."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.errors import InputError
from autocompress.report.sensitivity import FLOOR, figure, footer, print_sensitivity, rows, write_plot
from tests.core.test_sensitivity import FOUND


def test_rows_are_the_probed_choices_in_order_of_loss() -> None:
    assert rows(FOUND) == [("layer:b", "w8a8", "0.5", "-5.0 %"), ("width:a", "4", "0.2", "-10.0 %")]


def test_the_table_says_how_many_probes_and_what_was_left_out() -> None:
    out = io.StringIO()
    print_sensitivity(FOUND, out)
    shown = out.getvalue()
    assert "t on p, one choice at a time" in shown
    assert "2 probes in 1.5 s, on at most 128 calibration items." in shown
    assert "left out: recipe: a recipe trains" in shown
    assert "no measured latency" in shown


def test_the_footer_says_where_the_cost_of_integers_is_from() -> None:
    assert "at the 0.60 of float that a probe of this device measured" in footer(FOUND)[2]
    assert "by their bits" in footer(replace(FOUND, int8_ratio=None))[2]


def test_every_probe_is_a_point_and_no_loss_is_below_the_axis() -> None:
    free = {"skip:c": {"1": replace(FOUND.effects["width:a"]["4"], loss=0.0)}}
    traces = {t.name: t for t in figure(replace(FOUND, effects={**FOUND.effects, **free})).data}
    assert set(traces) == {"width", "layer", "skip"}
    assert list(traces["width"].x) == pytest.approx([10.0])
    assert list(traces["skip"].y) == [FLOOR]
    assert list(traces["layer"].text) == ["layer:b = w8a8"]


def test_pictures_are_files(tmp_path: Path) -> None:
    write_plot(FOUND, tmp_path / "s.html")
    assert "<script src=" not in (tmp_path / "s.html").read_text(encoding="utf-8")
    write_plot(FOUND, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "said"), [("s.pdf", "as .html or .png"), ("nowhere/s.png", "does not exist")])
def test_a_path_that_cannot_be_drawn_to_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_plot(FOUND, tmp_path / name)


def test_nothing_probed_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was probed"):
        write_plot(replace(FOUND, effects={}), tmp_path / "s.png")

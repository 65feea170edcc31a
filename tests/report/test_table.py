"""The table is legible piped, and holds every figure with its interval."""

import io

from autocompress.core.front import Front
from autocompress.report.table import HEADS, print_front, rows
from tests import made


def printed() -> str:
    out = io.StringIO()
    print_front(Front.of(made.trials()), "a title", ["A [bold] sentence."], out)
    return out.getvalue()


def test_piped_there_are_no_colours_and_no_cut_cells() -> None:
    shown = printed()
    assert "\x1b" not in shown
    assert "…" not in shown
    for head in HEADS:
        assert head in shown


def test_what_looks_like_markup_is_printed_as_it_is() -> None:
    assert "A [bold] sentence." in printed()


def test_a_row_has_accuracy_and_latency_with_intervals() -> None:
    row = dict(zip(HEADS, next(r for r in rows(Front.of(made.trials())) if r[0] == "2"), strict=True))
    assert row["Accuracy"] == "0.9450 [0.9350, 0.9550]"
    assert row["Latency, ms"] == "0.400 [0.392, 0.408]"
    assert row["Drop"] == "+0.50"
    assert (row["vs fp32"], row["vs int8"]) == ("2.50x faster", "1.25x faster")
    assert row["What"] == "1 × w8a8"


def test_baselines_that_are_off_the_front_stand_above_it() -> None:
    trials = [*made.trials(), made.trial(5, made.score(0.96, 0.3))]
    assert [row[0] for row in rows(Front.of(trials))] == ["0", "1", "3", "5"]

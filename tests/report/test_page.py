"""The report is one page that needs nothing else, and hides nothing that qualifies the figures."""

import re
from pathlib import Path

import pytest

from autocompress.core.errors import InputError
from autocompress.report.facts import facts_of, footer, read_log
from autocompress.report.page import page, write_report
from tests import made


@pytest.fixture
def html(tmp_path: Path) -> str:
    run = made.run(tmp_path / "run")
    return page(run, run.front(), made.trials())


def test_the_page_loads_nothing_from_elsewhere(html: str) -> None:
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", html)
    assert len(html) > 1_000_000  # the drawing library is inside


def test_the_page_tells_what_qualifies_the_figures(html: str) -> None:
    for said in ("Test CPU", "Failures by stage", "no kernel for &lt;Conv&gt;", "not listed", "Seed", "measure"):
        assert said in html


def test_text_of_a_task_or_a_runtime_is_escaped(html: str) -> None:
    assert "tied to &lt;embed&gt;" in html
    assert "<embed>" not in html


def test_layers_that_ran_otherwise_are_listed(html: str) -> None:
    assert "<tr><td>3</td><td>conv</td><td>fp32</td></tr>" in html


def test_a_run_without_a_score_is_refused(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", [])
    with pytest.raises(InputError, match="has no scored trial yet"):
        write_report(run, tmp_path / "x.html")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    with pytest.raises(InputError, match=r"the folder of .* does not exist"):
        write_report(run, tmp_path / "nowhere" / "x.html")


def test_time_and_failures_add_up_by_stage(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    facts = facts_of(run, run.front(), made.trials())
    assert facts.seconds == {"measure": 7.5, "score": 2.5}
    assert facts.failures == {"load": (1, "no kernel for <Conv>")}
    assert facts.left_alone == {"head": "its weight is tied to <embed>"}


def test_the_footer_counts_failures_and_what_was_left_alone(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    lines = footer(facts_of(run, run.front(), made.trials()), run.front(), made.trials())
    assert "1 of 5 trials failed: 1 in load." in lines
    assert "Left alone: 1 (head); `autocompress report` says why." in lines
    assert "Trial 3: the runtime did not run 1 layers as chosen (conv ran as fp32)." in lines


def test_a_log_line_that_was_cut_off_is_no_event(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"event": "tri')
    assert [event["event"] for event in read_log(run)] == ["model"]

"""Properties of what is shown while a search runs."""

import io
from dataclasses import replace

import pytest

from autocompress.core.candidate import Candidate
from autocompress.core.trial import Failure, Trial
from autocompress.progress import Lines, LiveView, Status, describe, headline, open_progress
from tests import scripted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def trials() -> list[Trial]:
    space = scripted.space()
    policies = [space.uniform("fp32"), space.uniform("w8a8"), space.uniform("w8a8", 0.5)]
    roles = ("fp32", "uniform-int8", "candidate")
    return [
        Trial(number=i, role=role, candidate=space.decode(p), outcome=scripted.score(space.decode(p)))
        for i, (p, role) in enumerate(zip(policies, roles, strict=True))
    ]


@pytest.fixture
def status(trials: list[Trial]) -> Status:
    return Status(
        done=3,
        failures=1,
        budget=60,
        elapsed_s=75.2,
        eta_s=3725.0,
        front=tuple(reversed(trials)),
        baselines={t.role: t.score for t in trials[:2] if t.score},
    )


def test_the_headline_has_counts_time_and_front(status: Status) -> None:
    assert headline(status).startswith("trial 3/60, 1 failed, 1 min 15 s, about 1 h 02 min left; 3 points on the front")
    open_end = replace(status, budget=None, eta_s=None, failures=0, baselines={})
    assert headline(open_end) == "trial 3, 1 min 15 s; 3 points on the front"


def test_faster_is_said_only_where_intervals_separate(status: Status, trials: list[Trial]) -> None:
    """Among points within one point of fp32: the same ratio is not faster, a separated one is."""
    vendor = trials[1].score
    assert vendor is not None
    near = replace(vendor, accuracy=0.949)
    same = replace(status, front=(replace(trials[2], outcome=near),))
    assert headline(same).endswith("2.50x of fp32 within one point")
    clear = replace(near, ratio=0.3, ratio_ci=(0.29, 0.31))
    faster = replace(status, front=(replace(trials[2], outcome=clear),))
    assert headline(faster).endswith("3.33x of fp32 within one point, faster than uniform-int8")


def test_a_failure_is_described_with_its_stage() -> None:
    assert describe(Failure(stage="load", error="E", message="no kernel")) == "failed in load: no kernel"


def test_lines_are_rare_and_the_last_one_is_never_lost(status: Status, trials: list[Trial]) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    candidate = Trial(number=3, role="candidate", candidate=Candidate(), outcome=trials[0].outcome)
    for done in range(3, 40):
        lines.trial(candidate, replace(status, done=done))
    assert stream.getvalue().count("\n") == 1
    lines.close()
    assert stream.getvalue().splitlines()[-1].startswith("trial 39/60")


def test_a_terminal_gets_the_live_view_with_the_best_points(status: Status, trials: list[Trial]) -> None:
    terminal = Terminal()
    view = open_progress(terminal)
    assert isinstance(view, LiveView)
    view.stage("fp32 baseline")
    view.trial(trials[2], status)
    view.close()
    shown = terminal.getvalue()
    assert "trial 3/60" in shown
    assert "uniform-int8" in shown
    assert "last: 2, accuracy" in shown


def test_elsewhere_lines(status: Status) -> None:
    assert isinstance(open_progress(io.StringIO()), Lines)

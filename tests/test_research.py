"""Properties of searching again where ranks flipped."""

from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.errors import InputError
from autocompress.package import MANIFEST
from autocompress.reprofile import Figures, Point, Reprofile
from autocompress.research import flipped, open_researchable, research
from autocompress.run import Run, open_run
from tests import made, scripted


def point(number: int, before: float, now: float | None, role: str = "candidate") -> Point:
    figures = Figures.of(made.score(0.9, before))
    return Point(
        trial=number,
        role=role,  # type: ignore[arg-type]
        recorded=figures,
        now=None if now is None else replace(figures, ratio=now),
        on_front=True,
        on_front_now=True,
        failure=None if now is not None else "load: no kernel",
    )


def result(*points: Point, entered: tuple[int, ...] = (), left: tuple[int, ...] = ()) -> Reprofile:
    return Reprofile(
        source="run", target="one", target_now="one", machine={}, fingerprint="", accuracy="reused", tau=None,
        points=points, entered=entered, left=left, pick=None,
    )  # fmt: skip


def test_flipped_are_those_whose_place_changed() -> None:
    same = [point(2, 0.2, 0.3), point(3, 0.4, 0.5), point(4, 0.6, 0.7)]
    assert flipped(result(*same)) == []
    assert flipped(result(same[0], point(3, 0.4, 0.9), same[2])) == [3, 4]


def test_baselines_and_models_that_fail_here_are_not_searched_around() -> None:
    points = [point(0, 1.0, 0.1, "fp32"), point(2, 0.2, 0.3), point(3, 0.1, None)]
    assert flipped(result(*points)) == [2]


def test_what_came_onto_the_front_or_left_it_counts() -> None:
    assert flipped(result(point(2, 0.2, 0.3), point(3, 0.4, 0.5), entered=(3,))) == [3]
    assert flipped(result(point(2, 0.2, 0.3), point(3, 0.4, 0.5), left=(2,))) == [2]


def test_a_package_or_a_run_without_a_reference_cannot_be_searched_again(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="is a package: --research needs the run it was picked from"):
        open_researchable(tmp_path)
    run = Run.create(tmp_path / "run", scripted.config(task=None))
    with pytest.raises(InputError, match="searched in Python with a Task"):
        open_researchable(run.path)


def test_where_no_rank_flipped_nothing_is_searched(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", scripted.config(task="digits"))
    assert research(run, result(point(2, 0.2, 0.3)), 5) is None


def test_trials_are_spent_around_the_models_that_flipped(digits_run: Run, tmp_path: Path) -> None:
    """A real search, begun with the models of the earlier run that are said to have flipped."""
    candidates = [t for t in digits_run.trials() if t.role == "candidate" and t.score]
    one, two = candidates[0], candidates[1]
    swapped = result(point(one.number, 0.2, 0.5), point(two.number, 0.3, 0.4))
    found = research(digits_run, swapped, 2, out=tmp_path / "again")
    assert found is not None
    again = open_run(found.path)
    assert again.config.around == (one.number, two.number)
    assert again.config.warm_start == str(digits_run.path)
    digests = [t.candidate.digest for t in again.trials() if t.role == "candidate"]
    assert digests[:2] == [one.candidate.digest, two.candidate.digest]
    assert len(digests) >= 4

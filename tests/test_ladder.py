"""Properties of the fidelity ladder, with candidates scored by a formula."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.front import Limits, judged
from autocompress.core.trial import Rung, Trial
from autocompress.ladder import FEWEST_STEPS, Attempt, Ladder, Steps
from autocompress.optimize.study import Study
from autocompress.run import Run
from tests import scripted


def climb(path: Path, trials: int = 60, **changes: object) -> Run:
    """A finished search with recovery."""
    terms = {"fidelity": "recover", "recover_steps": scripted.FULL, "trials": trials} | changes
    run = Run.create(path, scripted.config(**terms))
    scripted.drive(run, scripted.Scripted(run), trials=trials)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return climb(tmp_path_factory.mktemp("ladder") / "run")


def by_rung(run: Run) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {"oneshot": [], "short": [], "full": []}
    for trial in run.trials():
        if trial.role == "candidate":
            found[trial.rung].append(trial)
    return found


def test_steps_of_the_rungs() -> None:
    assert Steps.of(320) == Steps(short=40, full=320)
    assert Steps.of(40) == Steps(short=FEWEST_STEPS, full=40)
    assert Steps.of(10) == Steps(short=10, full=10)
    assert Steps.of(800).on("oneshot") == 0


def test_steps_follow_the_time_there_is_up_to_thirty_epochs() -> None:
    few, many = (Steps.within(seconds, 0.1, items=50_000, batch=32).full for seconds in (600, 6000))
    assert many == pytest.approx(10 * few, rel=0.01)
    assert Steps.within(1e6, 0.1, items=1000, batch=32).full == -(-30 * 1000 // 32)
    assert Steps.within(0.1, 1.0, items=1000, batch=32).full == FEWEST_STEPS


def test_every_rung_gets_its_share_and_the_cheap_one_most(run: Run) -> None:
    counts = {rung: len(trials) for rung, trials in by_rung(run).items()}
    assert counts["oneshot"] > counts["short"] > 0
    assert counts["full"] >= 5
    assert len(run.trials()) == 60


def test_who_climbs_was_on_the_rung_below_and_climbs_once(run: Run) -> None:
    rungs = by_rung(run)
    for rung, below in (("short", "oneshot"), ("full", "short")):
        assert {t.promoted_from for t in rungs[rung]} <= {t.number for t in rungs[below]}
        assert max(Counter(t.promoted_from for t in rungs[rung]).values()) == 1
    assert {t.candidate.recipe.recover_steps for t in rungs["oneshot"]} == {0}
    assert {t.candidate.recipe.recover_steps for t in rungs["short"]} == {Steps.of(scripted.FULL).short}
    assert {t.candidate.recipe.recover_steps for t in rungs["full"]} == {scripted.FULL}


def test_a_climber_is_the_same_candidate_but_for_its_steps(run: Run) -> None:
    known = {t.number: t.candidate for t in run.trials()}
    for trial in by_rung(run)["full"]:
        assert trial.promoted_from is not None
        below = known[trial.promoted_from]
        assert replace(below, recipe=replace(below.recipe, recover_steps=scripted.FULL)) == trial.candidate


def test_the_front_holds_fully_recovered_candidates_only(run: Run) -> None:
    points = run.front().points
    assert len(points) > 3
    assert {t.rung for t in points if t.role == "candidate"} == {"full"}
    assert all(t.role != "candidate" or t.rung == "full" for t in judged(run.trials()))


def test_what_climbs_is_better_than_what_does_not(run: Run) -> None:
    """By the formula itself: the recovered accuracies of all one-shot candidates are known."""
    known = {t.number: t for t in run.trials()}
    climbed = {known[t.promoted_from].promoted_from for t in by_rung(run)["full"] if t.promoted_from is not None}
    rates = []
    for trial in by_rung(run)["oneshot"]:
        full = replace(trial.candidate, recipe=replace(trial.candidate.recipe, recover_steps=scripted.FULL))
        found = scripted.score(full)
        rates.append((trial.number in climbed, found.accuracy, found.ratio))
    dominated = [sum(a > accuracy and r < ratio for _, a, r in rates) for inside, accuracy, ratio in rates if inside]
    others = [sum(a > accuracy and r < ratio for _, a, r in rates) for inside, accuracy, ratio in rates if not inside]
    assert sum(dominated) / len(dominated) < sum(others) / len(others)


def test_rank_correlations_are_logged(run: Run) -> None:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "ladder"][-1]
    assert last["pairs"]["oneshot-short"] >= 6
    assert -1 <= last["rank_correlation"]["oneshot-short"] <= 1


def test_an_accuracy_limit_steers_who_climbs(tmp_path: Path) -> None:
    run = climb(tmp_path / "run", limits=Limits(max_accuracy_drop=1.0))
    fp32 = next(t.score for t in run.trials() if t.role == "fp32" and t.score)
    full = [t.score for t in by_rung(run)["full"] if t.score]
    assert full
    assert sum(100 * (fp32.accuracy - s.accuracy) <= 1.5 for s in full) >= 0.7 * len(full)


def test_time_decides_the_steps_and_every_rung_is_reached(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", scripted.config(fidelity="recover", trials=None, timeout_s=6.0))
    scripted.drive(run, scripted.Scripted(run, sleep=0.01), trials=None, timeout=6.0)
    assert run.config.recover_steps == 0
    from autocompress.run import open_run

    decided = open_run(run.path).config.recover_steps
    assert decided >= FEWEST_STEPS
    counts = {rung: len(trials) for rung, trials in by_rung(run).items()}
    assert min(counts.values()) > 0


def test_a_resumed_search_climbs_on_from_what_is_there(tmp_path: Path) -> None:
    run = climb(tmp_path / "run", trials=30)
    before = {t.promoted_from for t in run.trials() if t.rung == "short"}
    scripted.drive(run, scripted.Scripted(run), trials=60)
    promoted = [t.promoted_from for t in run.trials() if t.rung == "short"]
    assert len(promoted) == len(set(promoted))
    assert before < set(promoted)


class Told:
    """A study of candidates of half the width, told one by one; fp32 is in it."""

    def __init__(self, study: Study) -> None:
        self.study, self.space, self.steps = study, scripted.space(), Steps.of(scripted.FULL)
        fp32 = self.space.uniform_float("fp32")
        whole = self.space.decode(fp32)
        study.tell(Trial(number=-1, role="fp32", candidate=whole, outcome=scripted.score(whole)), fp32, {})

    def tell(
        self, bits: str, rung: Rung = "oneshot", promoted_from: int | None = None, above: float = 0.0, **seconds: float
    ) -> int:
        """A trial, so much better than by the formula; its number."""
        variables = self.space.variables
        values = {n: bits if n.startswith("precision") else cs[0] for n, cs in variables.items()}
        values |= {n: cs[1] for n, cs in variables.items() if n.startswith("width")}
        candidate = self.space.decode(values, recover_steps=self.steps.on(rung))
        score = scripted.score(candidate)
        trial = Trial(
            number=-1, role="candidate", candidate=candidate, rung=rung, promoted_from=promoted_from,
            outcome=replace(score, accuracy=score.accuracy + above), seconds={"score": 1.0, **seconds},
        )  # fmt: skip
        return self.study.tell(trial, values, {}).number

    def next(self, left_s: float) -> Attempt:
        """What a ladder would try with so much time left."""
        left = {"progress": lambda: 0.9, "left_s": lambda: left_s}
        ladder = Ladder(self.study, self.space, self.steps, Limits(), by_time=False, **left)
        attempt = ladder.next()
        assert attempt is not None
        ladder.ended(attempt)
        return attempt


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    space = scripted.space()
    terms = (f"sqlite:///{tmp_path}/study.db", "study", ("accuracy", "latency"), space.variables)
    with Study(*terms, digest=lambda values: space.decode(values).digest, seed=0) as study:
        yield Told(study)


def test_a_recovery_is_begun_only_where_it_ends_in_time(told: Told) -> None:
    """Candidates that differ in bits share weights, trained for whoever comes first: the others tell no time."""
    one, other = told.tell("w8a8"), told.tell("fp32")
    for number, bits, took in ((one, "w8a8", {"recover": 10.0}), (other, "fp32", {})):
        climbed = told.tell(bits, "short", number, **took)
        assert told.next(200.0).rung == "full"
        assert told.next(60.0).rung == "oneshot"
    told.tell("fp32", "full", climbed, recover=80.0)
    assert told.next(60.0).rung == "full"


def test_time_that_is_left_goes_to_those_of_whom_little_is_hoped(told: Told) -> None:
    """One that came out far above the original leaves nothing to hope for, but there is nothing better to do."""
    one, other = told.tell("w8a8"), told.tell("fp32")
    high = told.tell("w8a8", "short", one, recover=10.0)
    waiting = told.tell("fp32", "short", other, recover=10.0)
    told.tell("w8a8", "full", high, above=0.1, recover=200.0)
    assert told.next(500.0).rung == "oneshot"
    attempt = told.next(150.0)  # too little for what a full one took so far, enough for this one
    assert (attempt.rung, attempt.promoted_from) == ("full", waiting)

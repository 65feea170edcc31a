"""Properties of the study: what is asked, what is kept, what other samplers see."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError, RunError
from autocompress.core.space import Space, SpaceRules, Values
from autocompress.core.trial import Failure, Role, Trial
from autocompress.optimize.nsga2 import generation_key
from autocompress.optimize.record import count_trials, read_attributes, read_trials
from autocompress.optimize.study import Study
from tests import scripted

OBJECTIVES = ("accuracy", "latency")
Make = Callable[..., Study]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def make(url: str) -> Iterator[Make]:
    """Studies on one record, closed at the end."""
    opened: list[Study] = []

    def open_study(space: Space | None = None, **changes: object) -> Study:
        space = space or scripted.space()
        arguments = {"digest": lambda v: space.decode(v).digest, "seed": 0} | changes
        study = Study(url, "s", OBJECTIVES, space.variables, **arguments)  # type: ignore[arg-type]
        opened.append(study)
        return study

    yield open_study
    for study in opened:
        study.close()


def scored(candidate: Candidate, role: Role = "candidate", layers: int = 6) -> Trial:
    outcome = scripted.score(candidate, layers)
    seconds = {"score": 0.25}
    return Trial(number=-1, role=role, candidate=candidate, outcome=outcome, seconds=seconds)


def step(study: Study, violations: Callable[[Trial], dict[str, float]] = lambda _: {}) -> Trial | None:
    values = study.ask()
    if values is None:
        return None
    trial = scored(scripted.space().decode(values))
    return study.tell(trial, values, violations(trial))


def record(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=url).trials


def test_a_trial_comes_back_as_it_was_told(make: Make, url: str) -> None:
    """Candidate, score, seconds and every raw sample, also where they are longer than one attribute may be."""
    study, space = make(), scripted.space()
    values = space.uniform("w8a8", 0.5)
    given = Trial(
        number=-1,
        role="candidate",
        candidate=space.decode(values),
        outcome=scripted.score(space.decode(values)),
        measurement=scripted.measurement(0.123456789, samples=1000),
        seconds={"score": 1.5},
    )
    told = study.tell(given, values, {"max_latency_ms": -0.25})
    assert told.number == 0
    read = read_trials(url, "s")
    assert read == [told]
    assert (read[0].measurement, read[0].outcome, read[0].candidate) == (
        given.measurement,
        given.outcome,
        given.candidate,
    )


def test_what_optuna_reads_is_written(make: Make, url: str) -> None:
    """Parameters, values, constraints, generation and duration stand where samplers and the dashboard look."""
    study = make()
    trial = step(study, lambda _: {"max_latency_ms": 0.5, "max_memory_mb": math.inf})
    assert trial is not None
    assert trial.score is not None
    (frozen,) = record(url)
    assert frozen.state == optuna.trial.TrialState.COMPLETE
    assert frozen.values == [trial.score.accuracy, trial.score.latency_ms]
    assert frozen.constraints == {"max_latency_ms": 0.5}
    assert set(frozen.params) == set(study.variables)
    assert frozen.system_attrs["NSGAIISampler:generation"] == 0
    assert frozen.duration is not None
    assert frozen.duration.total_seconds() == pytest.approx(0.25)


def test_a_failure_is_a_failed_trial_with_its_reason(make: Make, url: str) -> None:
    study = make()
    values = study.ask()
    assert values is not None
    candidate = scripted.space().decode(values)
    failure = Failure(stage="load", error="RuntimeError", message="no kernel")
    told = study.tell(Trial(number=-1, role="candidate", candidate=candidate, outcome=failure), values, {})
    (frozen,) = record(url)
    assert frozen.state == optuna.trial.TrialState.FAIL
    assert frozen.system_attrs["fail_reason"] == "load: no kernel"
    assert told.outcome == failure
    assert study.trials() == [told]


def test_no_candidate_is_asked_twice_and_an_empty_space_says_so(make: Make) -> None:
    """Different values of one candidate are one candidate: 3 precisions × 2 widths leave 6, the override adds none."""
    rules = SpaceRules(
        name="tiny", description="", layers=scripted.RULES.layers, widths=(scripted.WidthRule(ratios=(1.0, 0.5)),)
    )
    space = scripted.space(1, rules)
    variables = dict(space.variables) | {"irrelevant": (0, 1, 2)}

    def digest(values: Values) -> str:
        return space.decode({k: v for k, v in values.items() if k != "irrelevant"}).digest

    study = Study("sqlite:///:memory:", "s", OBJECTIVES, variables, digest=digest, seed=0)
    seen = []
    while (values := study.ask()) is not None:
        seen.append(digest(values))
        study.tell(scored(space.decode(values), layers=1), values, {})
    study.close()
    assert len(seen) == len(set(seen)) == 6


def test_what_was_asked_and_not_told_is_not_asked_again(make: Make) -> None:
    study, space = make(), scripted.space()
    asked = [space.decode(values).digest for values in (study.ask() for _ in range(30)) if values is not None]
    assert len(set(asked)) == 30


def test_a_duplicate_told_twice_is_kept_twice_and_harmless(make: Make) -> None:
    """Two workers may finish the same candidate: both are in the record, and asking goes on."""
    one, two = make(), make(seed=1)
    values = scripted.space().uniform("w8a8")
    trial = scored(scripted.space().decode(values))
    assert one.tell(trial, values, {}).number == 0
    assert two.tell(trial, values, {}).number == 1
    assert len(one) == len(two) == 2
    assert step(one) is not None


def test_enqueued_values_come_first_and_become_parents(make: Make, url: str) -> None:
    """With Optuna's own sampler they would have no generation, and never enter a population."""
    study, space = make(sampler="nsga2", population=4), scripted.space()
    wanted = [space.uniform("w8a8", ratio) for ratio in (1.0, 0.75, 0.5, 0.25)]
    for values in wanted:
        study.enqueue(values)
    for _ in range(5):
        step(study)
    frozen = record(url)
    assert [t.params for t in frozen[:4]] == wanted
    assert [t.system_attrs[generation_key()] for t in frozen] == [0, 0, 0, 0, 1]
    parents = [set(t.params.items()) for t in frozen[:4]]
    child = set(frozen[4].params.items())
    inherited = max(len(child & (a | b)) for a, b in itertools.combinations(parents, 2))
    assert inherited >= len(child) - 3


def test_enqueued_again_is_skipped(make: Make) -> None:
    study, values = make(), scripted.space().uniform("w8a8")
    study.enqueue(values)
    step(study)
    study.enqueue(values)
    assert study.ask() != values


def test_enqueue_refuses_what_is_no_choice(make: Make) -> None:
    with pytest.raises(InputError, match=r"`width:conv0` must be one of \[32, 24, 16, 8\], got 7"):
        make().enqueue({"width:conv0": 7})


def test_the_first_generation_is_bred_from_the_seeds(make: Make, url: str) -> None:
    """Not drawn at random: a child shares nearly all its values with the two seeds."""
    study, space = make(sampler="nsga2", population=40), scripted.space()
    seeds = [space.uniform("w8a8", 1.0), space.uniform("fp32", 0.5)]
    for values in seeds:
        study.enqueue(values)
    for _ in range(12):
        step(study)
    known = set().union(*(values.items() for values in seeds))
    foreign = [len(set(t.params.items()) - known) for t in record(url)[2:]]
    assert sum(foreign) / len(foreign) < 3


def test_generations_go_on_in_another_process(make: Make, url: str) -> None:
    """A study opened again takes generation and parents from the record."""
    first = make(sampler="nsga2", population=4)
    for _ in range(6):
        step(first)
    first.close()
    second = make(sampler="nsga2", population=4)
    for _ in range(7):
        step(second)
    assert [t.system_attrs[generation_key()] for t in record(url)] == [0] * 4 + [1] * 4 + [2] * 4 + [3]


def test_a_plain_optuna_sampler_carries_the_record_on(make: Make, url: str) -> None:
    study = make(sampler="nsga2", population=4)
    for _ in range(5):
        step(study)
    plain = optuna.load_study(
        study_name="s", storage=url, sampler=optuna.samplers.NSGAIISampler(population_size=4, seed=0)
    )
    distributions = {n: optuna.distributions.CategoricalDistribution(c) for n, c in study.variables.items()}
    asked = plain.ask(distributions)
    assert plain.trials[asked.number].system_attrs["NSGAIISampler:generation"] == 1


def test_a_resumed_study_draws_other_numbers(make: Make) -> None:
    first = make(seed=3)
    asked = [step(first) for _ in range(3)]
    first.close()
    again = make(seed=3)
    values = again.ask()
    assert values is not None
    assert scripted.space().decode(values) not in [t.candidate for t in asked if t]


def test_constraints_steer(tmp_path: Path) -> None:
    """With a latency limit that few policies meet, more of what is proposed meets it than without."""

    def feasible(limited: bool) -> int:
        space = scripted.space()
        url = f"sqlite:///{tmp_path / f'{limited}.db'}"
        with Study(
            url, "s", OBJECTIVES, space.variables, digest=lambda v: space.decode(v).digest, seed=0, sampler="nsga2",
            population=8,
        ) as study:  # fmt: skip
            trials = [
                step(study, (lambda t: {"max_latency_ms": excess(t)}) if limited else lambda _: {}) for _ in range(72)
            ]
        return sum(excess(t) <= 0 for t in trials[24:] if t)

    def excess(trial: Trial) -> float:
        assert trial.score is not None
        return (trial.score.latency_ms - 0.5) / 0.5

    assert feasible(True) > 1.5 * feasible(False)


def test_the_vendors_file_is_no_parent(make: Make, url: str) -> None:
    """It is in the record, but its values do not make it: breeding from it would mislead."""
    study, values = make(), scripted.space().uniform("w8a8")
    study.tell(scored(scripted.space().decode(values), role="uniform-int8"), values, {})
    assert generation_key() not in record(url)[0].system_attrs
    assert not study._mirror.get_trials()
    study.enqueue(values)
    assert study.ask() == values


def test_workers_share_what_is_finished(make: Make) -> None:
    one, two = make(), make(seed=1)
    step(one)
    step(two)
    assert [t.number for t in one.trials()] == [t.number for t in two.trials()] == [0, 1]


def test_another_space_is_refused(make: Make) -> None:
    make()
    with pytest.raises(RunError, match="the study 's' was made for other variables: resume it with the model"):
        make(scripted.space(4))


def test_a_foreign_trial_is_refused(make: Make, url: str) -> None:
    make()
    study = optuna.load_study(study_name="s", storage=url)
    study.add_trial(optuna.trial.create_trial(values=[0.5, 1.0]))
    with pytest.raises(RunError, match="trial 0 of the study was not written by autocompress: use a study of its own"):
        read_trials(url, "s")


def test_a_database_that_is_none_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to be taken for a damaged one" * 9)
    with pytest.raises(RunError, match=r"^the storage sqlite:///.*text.db cannot be used: .*not a database"):
        count_trials(f"sqlite:///{tmp_path / 'text.db'}", "s")
    with pytest.raises(RunError, match=r"the storage nosuch://me:…@host/db cannot be used") as raised:
        count_trials("nosuch://me:secret@host/db", "s")
    assert "secret" not in str(raised.value)


def test_attributes_say_which_run(make: Make, url: str) -> None:
    """And follow a run that was moved."""
    make(attributes={"run": "/somewhere"})
    make(attributes={"run": "/elsewhere"})
    make()
    assert read_attributes(url, "s")["run"] == "/elsewhere"
    with pytest.raises(RunError, match="the storage has no study 'other'"):
        read_attributes(url, "other")
    assert read_trials(url, "other") == []


def test_an_unknown_sampler_is_named(make: Make) -> None:
    with pytest.raises(InputError, match=r"Unknown sampler 'nsga3'\. Did you mean 'nsga2'"):
        make(sampler="nsga3")


def test_processes_that_create_the_record_together_do_not_fail_each_other(url: str) -> None:
    """A reader that comes while a search begins must not break it."""
    code = "import sys; from autocompress.optimize.record import read_trials; print(read_trials(sys.argv[1], 's'))"
    readers = [subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) for _ in range(4)]
    assert [reader.communicate()[0] for reader in readers] == [b"[]\n"] * 4

"""Properties of the sampler, on the formula of tests/scripted.py."""

import itertools
import statistics
from pathlib import Path

import numpy as np
import optuna
import pytest

from autocompress.begin import seeds
from autocompress.core.candidate import Candidate
from autocompress.core.front import OBJECTIVES, hypervolume
from autocompress.core.space import Choice, Values
from autocompress.core.trial import Failure, Trial
from autocompress.optimize.sampler import Guide, SurrogateSampler
from autocompress.optimize.study import Study
from tests import scripted

LAYERS = 16
SPACE = scripted.space(LAYERS)
PLAIN = scripted.score(Candidate(), LAYERS)
BLOCKS = {layer: block for block, members in SPACE.members.items() for layer in members}
BOUNDS = {"accuracy": PLAIN.accuracy - 0.1, "latency": PLAIN.latency_ms}


def effects(sign: float = 1.0) -> dict[str, dict[str, tuple[float, float]]]:
    """What each choice alone does by the formula; with another sign all of it is wrong."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, choices in SPACE.variables.items():
        scores = {str(c): scripted.score(SPACE.decode({name: c}), LAYERS) for c in choices}
        losses = {c: PLAIN.accuracy - s.accuracy for c, s in scores.items()}
        top = max(losses.values())
        found[name] = {
            c: (losses[c] if sign > 0 else top - losses[c], sign * (s.ratio - PLAIN.ratio)) for c, s in scores.items()
        }
    return found


def guide(sign: float = 1.0) -> Guide:
    return Guide(effects=effects(sign), bounds=BOUNDS, best_accuracy=PLAIN.accuracy, blocks=BLOCKS)


def search(
    folder: Path,
    sampler: str,
    seed: int,
    *,
    trials: int = 60,
    known: Guide | None = None,
    objectives: tuple[str, ...] = ("accuracy", "latency"),
) -> float:
    """Hypervolume after so many trials from uniform policies."""
    url = f"sqlite:///{folder}/{sampler}-{seed}-{known is None}.db"
    digest = lambda values: SPACE.decode(values).digest  # noqa: E731
    with Study(url, "s", objectives, SPACE.variables, digest=digest, seed=seed, sampler=sampler) as study:
        study.tell(Trial(number=-1, role="fp32", candidate=Candidate(), outcome=PLAIN), SPACE.uniform("fp32"), {})
        study.guide(known or Guide(bounds=BOUNDS, best_accuracy=PLAIN.accuracy, blocks=BLOCKS))
        for values in seeds(SPACE):
            study.enqueue(values)
        losses = []
        for _ in range(trials):
            values = study.ask()
            assert values is not None
            candidate = SPACE.decode(values)
            score = scripted.score(candidate, LAYERS)
            study.tell(Trial(number=-1, role="candidate", candidate=candidate, outcome=score), values, {})
            row = [OBJECTIVES[name].value(score) for name in objectives]
            losses.append([-v if n == "accuracy" else v for n, v in zip(objectives, row, strict=True)])
    worst = [OBJECTIVES[name].value(PLAIN) for name in objectives]
    reference = [-(v - 0.1) if n == "accuracy" else v for n, v in zip(objectives, worst, strict=True)]
    return hypervolume(np.array(losses, np.float64), np.array(reference, np.float64) + 1e-9)


def test_it_gets_further_than_nsga2_and_random_from_the_same_seeds(tmp_path: Path) -> None:
    ours, stock, chance = (
        statistics.median(search(tmp_path, sampler, seed) for seed in range(3))
        for sampler in ("surrogate", "nsga2", "random")
    )
    assert ours > 1.1 * stock
    assert stock >= chance


def test_effects_help_and_wrong_ones_do_no_lasting_harm(tmp_path: Path) -> None:
    guided = search(tmp_path, "surrogate", 0, known=guide())
    blind = search(tmp_path, "surrogate", 1)
    (tmp_path / "wrong").mkdir()
    misled = search(tmp_path / "wrong", "surrogate", 0, known=guide(-1.0), trials=80)
    assert guided >= 0.95 * blind
    assert misled > 0.8 * blind


def test_three_objectives_are_searched(tmp_path: Path) -> None:
    names = ("accuracy", "latency", "size")
    ours, chance = (search(tmp_path, s, 0, trials=40, objectives=names) for s in ("surrogate", "random"))
    assert ours > chance


def told(sampler: SurrogateSampler, count: int, violation: float = 0.0) -> optuna.Study:
    """A study with so many trials that were drawn at random."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    rng = np.random.default_rng(0)
    for i in range(count):
        values = {n: c[int(rng.integers(len(c)))] for n, c in SPACE.variables.items()}
        score = scripted.score(SPACE.decode(values), LAYERS)
        study.add_trial(
            optuna.trial.create_trial(
                values=[score.accuracy, score.latency_ms],
                params=values,
                distributions={n: optuna.distributions.CategoricalDistribution(c) for n, c in SPACE.variables.items()},
                constraints={"max_latency_ms": violation if i % 2 else -1.0},
            )
        )
    return study


def proposed(study: optuna.Study) -> dict[str, Choice]:
    distributions = {n: optuna.distributions.CategoricalDistribution(c) for n, c in SPACE.variables.items()}
    return dict(study.ask(distributions).params)


def test_nothing_known_is_proposed_and_no_proposal_twice() -> None:
    study = told(SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=0), 30)
    known = [dict(t.params) for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]
    found = [proposed(study) for _ in range(20)]
    assert all(found[i] not in found[:i] for i in range(20))
    assert all(values not in known for values in found)


def test_equal_seeds_propose_equally_and_others_do_not() -> None:
    studies = [told(SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=s), 30) for s in (0, 0, 5)]
    one, two, other = ([proposed(study) for _ in range(10)] for study in studies)
    assert one == two
    assert one != other


def test_what_others_are_at_is_as_good_as_done() -> None:
    """With the best proposal pending elsewhere, another one is expected to gain more."""
    first = proposed(told(SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=0), 30))
    pending: list[Values] = [first]
    sampler = SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=0, pending=lambda: pending)
    assert proposed(told(sampler, 30)) != first


def test_infeasible_trials_are_no_parents_while_there_are_others() -> None:
    sampler = SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=0)
    study = told(sampler, 30, violation=1.0)
    proposed(study)
    parents = [sampler._encoding.values(sampler._numbers[i]) for i in sampler._parents()]
    feasible = [
        dict(t.params)
        for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        if all(value <= 0 for value in t.constraints.values())
    ]
    assert len(feasible) == 15
    assert 0 < len(parents) <= 15
    assert all(values in feasible for values in parents)


@pytest.mark.parametrize("trials", [3, 9])
def test_where_all_is_known_something_is_proposed_all_the_same(trials: int) -> None:
    """Whoever asked sees that it is known, and decides."""
    variables: dict[str, tuple[Choice, ...]] = {"width:a": (3, 2, 1), "precision:b": ("fp32", "w8a8", "w4a8")}
    few = {n: c[: 1 if trials == 3 and n == "precision:b" else 3] for n, c in variables.items()}
    sampler = SurrogateSampler(few, ("accuracy", "latency"), seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    distributions = {n: optuna.distributions.CategoricalDistribution(c) for n, c in few.items()}
    for i, point in enumerate(itertools.product(*few.values())):
        params = dict(zip(few, point, strict=True))
        study.add_trial(
            optuna.trial.create_trial(values=[0.9 - 0.1 * i, 1 / (1 + i)], params=params, distributions=distributions)
        )
    assert len(study.trials) == trials
    assert set(study.ask(distributions).params) == set(few)


def test_where_nothing_is_feasible_the_least_infeasible_are_parents() -> None:
    sampler = SurrogateSampler(SPACE.variables, ("accuracy", "latency"), seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    distributions = {n: optuna.distributions.CategoricalDistribution(c) for n, c in SPACE.variables.items()}
    for i, ratio in enumerate((1.0, 0.75, 0.5, 0.25) * 8):
        values = SPACE.uniform("w8a8", ratio) | {f"width:conv{i % LAYERS}": 32}
        study.add_trial(
            optuna.trial.create_trial(
                values=[0.9, 1 + 0.01 * i], params=values, distributions=distributions, constraints={"x": 40.0 - i}
            )
        )
    proposed(study)
    assert min(sampler._parents()) >= 20


def test_a_failure_is_not_tried_again_and_teaches_nothing(tmp_path: Path) -> None:
    digest = lambda values: SPACE.decode(values).digest  # noqa: E731
    with Study(f"sqlite:///{tmp_path}/s.db", "s", ("accuracy", "latency"), SPACE.variables, digest=digest, seed=0) as s:
        for values in seeds(SPACE):
            s.enqueue(values)
        seen = []
        for _ in range(25):
            values = s.ask()
            assert values is not None
            candidate = SPACE.decode(values)
            failure = Failure(stage="load", error="RuntimeError", message="no kernel")
            seen.append(candidate.digest)
            s.tell(Trial(number=-1, role="candidate", candidate=candidate, outcome=failure), values, {})
    assert len(set(seen)) == 25


@pytest.mark.parametrize("sampler", ["surrogate", "nsga2", "tpe", "random"])
def test_every_sampler_goes_on_with_the_record_of_another(tmp_path: Path, sampler: str) -> None:
    digest = lambda values: SPACE.decode(values).digest  # noqa: E731
    for name in ("surrogate", sampler):
        url = f"sqlite:///{tmp_path}/s.db"
        with Study(url, "s", ("accuracy", "latency"), SPACE.variables, digest=digest, seed=0, sampler=name) as study:
            for values in seeds(SPACE)[:6]:
                study.enqueue(values)
            for _ in range(8):
                values = study.ask()
                assert values is not None
                candidate = SPACE.decode(values)
                score = scripted.score(candidate, LAYERS)
                study.tell(Trial(number=-1, role="candidate", candidate=candidate, outcome=score), values, {})
            count = len(study)
    assert count == 16

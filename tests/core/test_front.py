import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError, NoPointError
from autocompress.core.front import (
    Front,
    Limits,
    hypervolume,
    judged,
    knee,
    nondominated,
    parse_objectives,
    point_json,
)
from autocompress.core.trial import Failure, Role, Score, Trial

REASONS = dict.fromkeys(("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed"), "not here")
# Few distinct values, so that ties and equal rows happen.
LOSSES = st.integers(1, 3).flatmap(
    lambda k: arrays(np.float64, st.tuples(st.integers(1, 12), st.just(k)), elements=st.integers(0, 5).map(float))
)


def score(accuracy: float, latency_ms: float, size_bytes: int = 1_000_000, **more: Any) -> Score:
    """A score against an fp32 of 1 ms."""
    reasons = {name: why for name, why in REASONS.items() if more.get(name) is None}
    ci = (latency_ms * 0.98, latency_ms * 1.02)
    return Score(
        accuracy=accuracy,
        latency_ms=latency_ms,
        latency_ms_ci=ci,
        ratio=latency_ms,
        ratio_ci=ci,
        size_bytes=size_bytes,
        reasons=reasons,
        **more,
    )


def trial(number: int, outcome: Score | Failure, role: Role = "candidate") -> Trial:
    """A trial with an artifact in name."""
    artifact = Artifact(
        path=f"artifacts/{number}.onnx", format="onnx", inputs=(), outputs=(), sha256=f"{number}", size_bytes=1
    )
    return Trial(number=number, role=role, candidate=Candidate(), outcome=outcome, artifact=artifact)


def front(*points: tuple[float, float] | tuple[float, float, int]) -> Front:
    """The front of trials with these (accuracy, latency[, size]) figures; the first is fp32."""
    scores = [score(*point) for point in points]
    return Front.of([trial(i, s, "candidate" if i else "fp32") for i, s in enumerate(scores)])


def dominates(a: Any, b: Any) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(LOSSES)
def test_nondominated_rows_are_those_that_no_row_beats_first_of_equals(losses: Any) -> None:
    rows = [tuple(row) for row in losses]
    wanted = [not any(dominates(other, row) for other in rows) and row not in rows[:i] for i, row in enumerate(rows)]
    assert nondominated(losses).tolist() == wanted


@given(LOSSES)
def test_hypervolume_equals_the_cells_that_some_point_dominates(losses: Any) -> None:
    reference = np.full(losses.shape[1], 5.0)
    cells = itertools.product(range(5), repeat=losses.shape[1])
    count = sum(any(all(p <= c for p, c in zip(row, cell, strict=True)) for row in losses) for cell in cells)
    assert hypervolume(losses, reference) == pytest.approx(count)


@given(LOSSES)
def test_dominated_points_add_no_volume(losses: Any) -> None:
    reference = np.full(losses.shape[1], 6.0)
    assert hypervolume(losses[nondominated(losses)], reference) == pytest.approx(hypervolume(losses, reference))


@given(LOSSES, st.floats(0.1, 10), st.floats(-5, 5))
def test_knee_is_on_the_front_whatever_the_units(losses: Any, factor: float, shift: float) -> None:
    chosen = knee(losses)
    ideal = losses.min(0)
    assert not any(dominates(row, losses[chosen]) for row in losses)
    scaled = (losses - ideal) / np.where(np.ptp(losses, axis=0) > 0, np.ptp(losses, axis=0), 1)
    distances = np.sqrt((scaled**2).sum(1))
    assert distances[chosen] == pytest.approx(distances.min())
    assert distances[knee(losses * factor + shift)] == pytest.approx(distances.min())


def test_a_front_is_fastest_first_without_failures_and_what_is_beaten() -> None:
    trials = [
        trial(0, score(0.95, 1.0), "fp32"),
        trial(1, score(0.94, 0.5), "uniform-int8"),
        trial(2, score(0.93, 0.6)),
        trial(3, score(0.90, 0.3)),
        trial(4, Failure(stage="load", error="E", message="m")),
        trial(5, score(0.94, 0.5)),
    ]
    made = Front.of(trials)
    assert [t.number for t in made.points] == [3, 1, 0]
    assert {role: t.number for role, t in made.baselines.items()} == {"fp32": 0, "uniform-int8": 1}


def test_baselines_stand_beside_the_front_even_when_beaten() -> None:
    made = Front.of([trial(0, score(0.9, 1.0), "fp32"), trial(1, score(0.95, 0.5))])
    assert [t.number for t in made.points] == [1]
    assert made.baselines["fp32"].number == 0


def test_a_trial_without_an_objectives_figure_is_left_out() -> None:
    known, unknown = trial(0, score(0.9, 1.0, peak_memory_bytes=5)), trial(1, score(0.95, 0.5))
    assert [t.number for t in Front.of([known, unknown], ("accuracy", "latency", "memory")).points] == [0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("accuracy", "latencies"), "Unknown objective 'latencies'. Did you mean 'latency'"),
        (("accuracy",), "objectives are accuracy,latency and optionally others, each once, got accuracy"),
        (("accuracy", "latency", "size", "size"), "each once, got accuracy,latency,size,size"),
    ],
)
def test_objectives_that_are_not_known_or_not_enough_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_objectives(names)


def test_hypervolume_of_a_front_takes_its_reference_in_the_objectives_own_units() -> None:
    assert front((0.9, 1.0), (0.5, 0.25)).hypervolume((0.4, 2.0)) == pytest.approx(0.1 * 1.75 + 0.4 * 1.0)


def test_what_is_clearly_better_is_on_the_front_for_sure_and_a_tie_is_not() -> None:
    sure = score(0.95, 1.0, accuracy_ci=(0.94, 0.96))
    tied = replace(sure, accuracy=0.9499, latency_ms=0.999)
    beaten = replace(sure, accuracy=0.5, latency_ms=2.0)
    probability = Front.of(
        [trial(0, sure, "fp32"), trial(1, tied), trial(2, beaten), trial(3, score(0.2, 0.1))]
    ).probability
    assert probability[3] == 1.0
    assert 0.1 < probability[0] < 1.0
    assert 0.1 < probability[1] < 1.0
    assert probability.get(2, 0.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.5, 1), st.floats(0.1, 1)), min_size=1, max_size=8))
def test_probabilities_are_shares_and_cover_every_point(points: list[tuple[float, float]]) -> None:
    made = front(*points)
    assert {t.number for t in made.points} <= made.probability.keys()
    assert all(0 <= p <= 1 for p in made.probability.values())


POINTS = ((0.95, 1.0, 4_000_000), (0.94, 0.5, 1_000_000), (0.90, 0.3, 2_000_000))


@pytest.mark.parametrize(
    ("terms", "number"),
    [
        ({}, 2),
        ({"max_accuracy_drop": 1.5}, 1),
        ({"max_accuracy_drop": 0.0}, 0),
        ({"min_accuracy": 0.9}, 2),
        ({"max_latency_ms": 0.6}, 1),
        ({"max_latency_ms": 0.5}, 1),
        ({"max_size_mb": 2.0}, 1),
        ({"max_size_mb": 2.0, "min_accuracy": 0.5}, 2),
        ({"prefer": "most-accurate"}, 0),
        ({"prefer": "fastest"}, 2),
        ({"prefer": "smallest"}, 1),
        ({"prefer": "knee"}, 1),
        ({"prefer": "most-accurate", "max_latency_ms": 0.9}, 1),
        ({"prefer": "knee", "max_latency_ms": 0.4}, 2),
    ],
)
def test_pick(terms: dict[str, Any], number: int) -> None:
    assert front(*POINTS).pick(**terms).number == number


@given(st.floats(0.05, 1.5), st.floats(0.0, 8.0))
def test_what_is_picked_meets_the_limits_and_else_the_nearest_point_is_named(latency: float, drop: float) -> None:
    made = front(*POINTS)
    limits = Limits(max_latency_ms=latency, max_accuracy_drop=drop)
    fp32 = made.baselines["fp32"].score
    worst = {
        t.number: max(limits.violations(s, fp32).items(), key=lambda item: item[1])
        for t in made.points
        if (s := t.score) is not None
    }
    if any(excess <= 0 for _, excess in worst.values()):
        assert worst[made.pick(limits).number][1] <= 0
        return
    with pytest.raises(NoPointError) as caught:
        made.pick(limits)
    nearest = min(worst, key=lambda number: worst[number][1])
    assert f"`{worst[nearest][0]}`" in str(caught.value)
    assert f"The nearest is trial {nearest}:" in str(caught.value)


def test_when_nothing_fits_the_sentence_names_limit_point_and_figures() -> None:
    with pytest.raises(NoPointError) as caught:
        front(*POINTS).pick(max_latency_ms=0.25, min_accuracy=0.9)
    assert str(caught.value) == (
        "No point meets the limits; `max_latency_ms` = 0.25 binds. The nearest is trial 2: "
        "accuracy 0.9000, 5.00 points below fp32, 0.3 ms, 2 MB."
    )
    assert caught.value.exit_code == 1


def test_memory_that_was_not_measured_meets_no_limit() -> None:
    with pytest.raises(NoPointError, match="`max_memory_mb` = 5 binds"):
        front((0.9, 1.0)).pick(max_memory_mb=5)


def test_an_empty_front_says_so() -> None:
    with pytest.raises(NoPointError, match="the front is empty: no trial was scored"):
        Front.of([trial(0, Failure(stage="load", error="E", message="m"))]).pick()


def test_an_accuracy_drop_needs_fp32() -> None:
    with pytest.raises(InputError, match="`max_accuracy_drop` needs the fp32 baseline, and this run has none yet"):
        Front.of([trial(0, score(0.9, 1.0))]).pick(max_accuracy_drop=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_limit_is_a_finite_number(value: float) -> None:
    with pytest.raises(InputError, match=f"`max_latency_ms` must be a finite number, got {value}"):
        Limits(max_latency_ms=value)


def test_violations_are_shares_of_the_limit() -> None:
    limits = Limits(max_latency_ms=0.5, max_accuracy_drop=2.0, min_accuracy=0.5, max_size_mb=4, max_memory_mb=1)
    found = limits.violations(score(0.9, 1.0, 2_000_000), score(0.95, 1.0))
    assert found == pytest.approx(
        {
            "max_latency_ms": 1.0,
            "max_accuracy_drop": 1.5,
            "min_accuracy": -0.8,
            "max_size_mb": -0.5,
            "max_memory_mb": math.inf,
        }
    )
    assert Limits().violations(score(0.9, 1.0), None) == {}


def test_a_point_in_json_has_every_figure_or_its_reason() -> None:
    made = front((0.95, 1.0), (0.9, 0.5))
    point = point_json(made.points[0], made)
    assert point["speedup_vs_fp32"] == pytest.approx(2.0)
    assert point["artifact"] == {"path": "artifacts/1.onnx", "format": "onnx", "sha256": "1"}
    assert point["front_probability"] == made.probability[1]
    missing = {name for name, value in point.items() if value is None}
    assert missing == {"accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed_differs"}
    reasons = {name for name in point if name.endswith("_reason")}
    assert reasons == {f"{n}_reason".replace("energy_mj", "energy") for n in missing}


@st.composite
def measured_fronts(draw: st.DrawFn) -> Front:
    """Fronts whose points have intervals in accuracy and latency."""
    count = draw(st.integers(1, 8))
    figures = st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(0, 4))
    trials = []
    for i in range(count):
        a, latency, half = draw(figures)
        accuracy = a / 30
        ci = (accuracy - half / 60, accuracy + half / 60)
        trials.append(trial(i, score(accuracy, latency / 10, accuracy_ci=ci)))
    return Front.of(trials)


@given(measured_fronts())
def test_merging_leaves_one_point_for_those_that_no_figure_tells_apart(found: Front) -> None:
    merged = found.merged()
    kept = {t.number: t for t in merged.points}
    gone = [t for t in found.points if t.number not in kept]
    assert sorted(n for numbers in merged.ties.values() for n in numbers) == sorted(t.number for t in gone)
    assert set(merged.ties) <= set(kept)
    for t in gone:
        (stands,) = [kept[n] for n, numbers in merged.ties.items() if t.number in numbers]
        assert t.score is not None
        assert stands.score is not None
        assert t.score.latency_ms_ci[0] <= stands.score.latency_ms_ci[1]
        assert stands.score.latency_ms_ci[0] <= t.score.latency_ms_ci[1]


@given(measured_fronts())
def test_merging_keeps_a_point_that_is_fastest_by_separated_intervals(found: Front) -> None:
    fastest, *others = found.points
    assert fastest.score is not None
    if all(t.score and t.score.latency_ms_ci[0] > fastest.score.latency_ms_ci[1] for t in others):
        assert fastest in found.merged().points


def test_ties_stand_in_the_document_of_their_point() -> None:
    trials = [trial(i, score(0.9, 1 + 0.001 * i, accuracy_ci=(0.88 + 0.001 * i, 0.92))) for i in range(2)]
    trials[1] = replace(trials[1], outcome=score(0.905, 1.001, accuracy_ci=(0.88, 0.92)))
    merged = Front.of(trials).merged()
    (kept,) = merged.points
    (tied,) = merged.ties[kept.number]
    assert {kept.number, tied} == {0, 1}
    assert point_json(kept, merged)["ties"] == [tied]


def test_a_baseline_stands_for_no_candidate() -> None:
    wide = (0.85, 0.95)
    trials = [
        trial(0, score(0.9, 1.0, accuracy_ci=wide), "uniform-int8"),
        trial(1, score(0.94, 1.001, accuracy_ci=wide)),
    ]
    merged = Front.of(trials).merged()
    assert [t.number for t in merged.points] == [0, 1]
    assert merged.ties == {}


def test_a_score_of_a_part_of_the_items_is_on_no_front() -> None:
    trials = [trial(0, score(0.9, 1.0), "fp32"), trial(1, replace(score(0.99, 0.1), items=512))]
    assert [t.number for t in Front.of(trials).points] == [0]


def test_the_highest_rung_that_has_a_score_is_judged() -> None:
    fp32 = trial(0, score(0.9, 1.0), "fp32")
    low, short = trial(1, score(0.8, 0.5)), replace(trial(2, score(0.85, 0.5)), rung="short")
    failed = replace(trial(3, Failure(stage="load", error="E", message="m")), rung="full")
    assert judged([fp32, low]) == [fp32, low]
    assert judged([fp32, low, short, failed]) == [fp32, short]

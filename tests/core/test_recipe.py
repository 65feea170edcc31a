from typing import Any

import pytest
from hypothesis import given

from autocompress.core.errors import InputError
from autocompress.core.recipe import DEFAULT_STAGES, Distill, Plan, Prune, Quantize, Recipe, Stage, Train, parts
from autocompress.core.record import from_json, to_json
from tests.core.strategies import PLANS


@given(PLANS)
def test_a_plan_reads_back_as_it_was_written(plan: Plan) -> None:
    assert from_json(Plan, to_json(plan)) == plan


def test_what_is_default_is_not_written() -> None:
    assert to_json(Recipe(recover_steps=3)) == {"calibrator": "minmax", "recover_steps": 3}
    assert "stages" in to_json(Recipe(stages=(Stage(name="other", train=Train()),)))


def test_cycles_go_evenly_to_the_part_of_their_stage() -> None:
    stage = Stage(name="shrink", prune=Prune(part=0.8), cycles=3)
    assert list(parts(stage, 0.2)) == pytest.approx([0.4, 0.6, 0.8])
    assert list(parts(Stage(name="learn", train=Train()), 0.2)) == [None]


def test_weights_depend_on_bits_where_a_stage_changes_them_for_their_sake() -> None:
    gate = Stage(name="quantize", quantize=Quantize(), gate=1.0)
    assert not Recipe(stages=(*DEFAULT_STAGES, gate)).quantizes
    assert Recipe(stages=(*DEFAULT_STAGES, Stage(name="q", quantize=Quantize(equalize=True)))).quantizes
    assert Recipe(stages=(*DEFAULT_STAGES, gate)).last_gate is gate
    assert Recipe(stages=(gate, Stage(name="q", quantize=Quantize(equalize=True)))).last_gate is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(part=0.0), r"`part` must be in \(0, 1\], got 0.0"),
        (lambda: Distill(weight=0.0), r"`weight` must be in \(0, 1\], got 0.0; kind: none is for labels only"),
        (lambda: Distill(temperature=0), "`temperature` must be positive, got 0"),
        (lambda: Distill(assistants=(1.5,)), r"`assistants` are width ratios in \(0, 1\), got 1.5"),
        (lambda: Train(batch_size=0), "`batch_size` must be positive, got 0"),
        (lambda: Stage(name="idle"), "stage 'idle' does nothing: give it `prune`, `quantize` or `train`"),
        (
            lambda: Stage(name="q", quantize=Quantize(aware=True)),
            "stage 'q': `aware` is about training, give it `train`",
        ),
        (lambda: Plan(name="p", stages=()), "recipe 'p' has no stages"),
        (lambda: Plan(name="p", stages=DEFAULT_STAGES * 2), "recipe 'p': two stages have the same name"),
        (
            lambda: Plan(name="p", stages=(Stage(name="a", prune=Prune(part=0.5)),)),
            r"recipe 'p': the `part` of its stages must grow and end at 1, got \[0.5\]",
        ),
        (
            lambda: Plan(name="p", stages=tuple(Stage(name=n, train=Train(share=0.6)) for n in "ab")),
            "recipe 'p': the shares of training add up to 1.2, at most 1 is there",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

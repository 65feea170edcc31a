"""The record of sensitivities: what it holds, and that it survives its file."""

import json

import pytest

from autocompress.core.errors import InputError
from autocompress.core.record import dump, load
from autocompress.core.sensitivity import SCHEMA, Effect, Sensitivity

FOUND = Sensitivity(
    task="t",
    target="p",
    effects={
        "width:a": {"8": Effect(loss=0.0, cost=0.0, probed=False), "4": Effect(loss=0.2, cost=-0.1)},
        "layer:b": {"w8a8": Effect(loss=0.5, cost=-0.05)},
        "layer:c": {},
    },
    unit="kl divergence",
    probes=2,
    seconds=1.5,
    items=128,
    int8_ratio=0.6,
    left_out={"recipe": "a recipe trains"},
)


def test_a_record_survives_json() -> None:
    assert load(Sensitivity, json.loads(json.dumps(dump(FOUND, SCHEMA))), SCHEMA) == FOUND


def test_a_record_of_a_later_version_is_refused() -> None:
    with pytest.raises(InputError, match="newer than the 1 known here"):
        load(Sensitivity, dump(FOUND, 2), SCHEMA)


def test_variables_are_ranked_by_their_largest_loss() -> None:
    assert FOUND.ranked() == ("layer:b", "width:a", "layer:c")


@pytest.mark.parametrize(("fields", "said"), [({"loss": -1.0}, "`loss`"), ({"cost": -1.5}, "`cost`")])
def test_an_effect_gains_no_accuracy_and_saves_no_more_than_there_is(fields: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Effect(**{"loss": 0.0, "cost": 0.0, **fields})


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="`loss` must be at least 0, got nan"):
        Effect(loss=float("nan"), cost=0.0)

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given

from autocompress.core.errors import InputError
from autocompress.core.measurement import Measurement
from autocompress.core.record import dump, from_json, load, to_json
from autocompress.core.trial import Trial
from tests.core.strategies import TRIALS, measurements


@dataclass(frozen=True, kw_only=True)
class Leaf:
    kind: Literal["oak", "elm"] = "oak"


@dataclass(frozen=True, kw_only=True)
class Record:
    count: int
    share: float = 0.5
    pair: tuple[float, int] = (1.0, 2)
    series: tuple[float, ...] = ()
    named: dict[str, bool] = field(default_factory=dict)
    leaf: Leaf | None = None
    option: str | int | float | bool = ""


@given(TRIALS)
def test_a_trial_survives_json_text(trial: Trial) -> None:
    text = json.dumps(dump(trial, 1))
    assert load(Trial, json.loads(text), 1) == trial


@given(measurements())
def test_raw_samples_survive_json_text_bit_by_bit(measurement: Measurement) -> None:
    assert from_json(Measurement, json.loads(json.dumps(to_json(measurement)))) == measurement


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`Record.count` is missing"),
        ({"count": 1, "cout": 2}, "`Record`: Unknown key 'cout'. Did you mean 'count'"),
        ({"count": 1.0}, "`Record.count` must be int, got 1.0"),
        ({"count": True}, "`Record.count` must be int, got True"),
        ({"count": "1"}, "`Record.count` must be int, got '1'"),
        ({"count": 1, "share": "x"}, "`Record.share` must be float, got 'x'"),
        ({"count": 1, "share": True}, "`Record.share` must be float, got True"),
        ({"count": 1, "share": float("nan")}, "`Record.share` must be a finite number, got nan"),
        ({"count": 1, "pair": [1.0]}, "`Record.pair` must have 2 items, got 1"),
        ({"count": 1, "pair": 3}, "`Record.pair` must be a list, got 3"),
        ({"count": 1, "series": [1.0, float("inf")]}, r"`Record.series\[1\]` must be a finite number, got inf"),
        ({"count": 1, "series": [1.0, None]}, r"`Record.series\[1\]` must be float, got None"),
        ({"count": 1, "named": [1]}, r"`Record.named` must be an object, got \[1\]"),
        ({"count": 1, "named": {"a": 1}}, "`Record.named.a` must be bool, got 1"),
        ({"count": 1, "leaf": {"kind": "ash"}}, r"`Record.leaf.kind` must be one of \['oak', 'elm'\], got 'ash'"),
        ({"count": 1, "leaf": {"kinds": "oak"}}, "`Record.leaf`: Unknown key 'kinds'. Did you mean 'kind'"),
        ([], r"`Record` must be an object, got \[\]"),
    ],
)
def test_what_writing_would_not_have_produced_is_refused_by_place_and_value(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json(Record, data)


def test_defaults_stand_for_keys_that_are_not_there() -> None:
    assert from_json(Record, {"count": 1}) == Record(count=1)


@pytest.mark.parametrize("value", ["text", 3, 0.25, True])
def test_an_option_keeps_its_type(value: Any) -> None:
    read = from_json(Record, to_json(Record(count=1, option=value)))
    assert read.option == value
    assert type(read.option) is type(value)


def test_whole_numbers_are_read_as_floats_where_floats_belong() -> None:
    read = from_json(Record, {"count": 1, "series": [1, 2.5], "share": 1})
    assert read.series == (1.0, 2.5)
    assert all(type(value) is float for value in (*read.series, read.share))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "a record holds finite numbers only, got nan"),
        (float("inf"), "a record holds finite numbers only, got inf"),
        (np.int64(1), "a record cannot hold a int64"),
        ({1, 2}, "a record cannot hold a set"),
    ],
)
def test_what_json_cannot_hold_is_refused_when_writing(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_json({"value": [value]})


def test_a_newer_schema_is_refused_and_says_to_upgrade() -> None:
    data = dump(Record(count=1), 3)
    assert load(Record, data, 3) == load(Record, data, 4) == Record(count=1)
    with pytest.raises(InputError, match="this Record record has schema 3, newer than the 2 known here: upgrade"):
        load(Record, data, 2)


@pytest.mark.parametrize("data", [{}, {"schema": "1"}, [], None, {"schema": None}])
def test_what_has_no_schema_number_is_no_record(data: Any) -> None:
    with pytest.raises(InputError, match="not a Record record: there is no integer `schema` in it"):
        load(Record, data, 1)

"""Text on the command line becomes values, or is refused with what was expected."""

import argparse

import pytest

from autocompress.cli.arguments import duration, limits_of, names
from autocompress.cli.search import anchored
from autocompress.core.front import Limits


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("45", 45), ("12.5", 12.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30 m", "m", "-5s", "1d", "30m!", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a duration is like 90s, 30m or 1h30m, got"):
        duration(text)


def test_names_are_split_at_commas() -> None:
    assert names("accuracy, latency,size,") == ("accuracy", "latency", "size")


def test_limits_that_were_not_given_are_none() -> None:
    assert limits_of(argparse.Namespace(max_latency_ms=2.0)) == Limits(max_latency_ms=2.0)


def test_a_task_file_is_kept_with_its_absolute_path(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert anchored("task.py:make") == f"{tmp_path}/task.py:make"
    assert anchored("digits") == "digits"
    assert anchored("package.module:name") == "package.module:name"

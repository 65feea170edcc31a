"""What was picked from a run, kept in run/picks.json so that a later measurement can say whether it still holds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autocompress.core.errors import InputError, RunError
from autocompress.core.front import Limits
from autocompress.core.record import RARE, dump, load
from autocompress.run import Run, utc_now, write_json

SCHEMA = 1
FILE = "picks.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """One pick: the trial, the limits it had to meet, and the package it went into. `time` is UTC, ISO 8601.

    Of a cascade it is the large model, and `small` is the other one.
    """

    trial: int
    limits: Limits
    package: str
    time: str
    small: int | None = field(default=None, metadata=RARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picks:
    picks: tuple[Pick, ...]


def read_picks(run: Run) -> Sequence[Pick]:
    """All picks from a run, oldest first.

    Raises:
        RunError: the file is not what this version writes.
    """
    path = run.path / FILE
    try:
        return load(_Picks, json.loads(path.read_text(encoding="utf-8")), SCHEMA).picks
    except FileNotFoundError:
        return ()
    except (json.JSONDecodeError, UnicodeDecodeError, InputError) as error:
        raise RunError(f"{path} is not a list of picks: {error}; remove it to go on without") from error


def note_pick(run: Run, trial: int, limits: Limits, package: Path, *, small: int | None = None) -> None:
    """Add a pick to the run and to its log."""
    pick = Pick(trial=trial, limits=limits, package=str(package), time=utc_now(), small=small)
    write_json(run.path / FILE, dump(_Picks(picks=(*read_picks(run), pick)), SCHEMA))
    cascade = {} if small is None else {"small": small}
    run.log("picked", trial=trial, limits=limits, package=str(package), **cascade)

"""The Optuna study as the record of a search: opening its storage, and a Trial to its form there and back.

A trial is written once, when it is finished, in one transaction.
Its user attributes `trial` and `measurement:0`, `measurement:1`… hold the Trial, its values and constraints are what
samplers and the dashboard read.
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from autocompress.core.errors import RunError
from autocompress.core.front import parse_objectives
from autocompress.core.record import dump, load, to_json
from autocompress.core.space import Choice, Values
from autocompress.core.trial import SCHEMA, Failure, Trial

# MySQL keeps an attribute in a TEXT of 65,535 bytes; raw samples are longer.
CHUNK = 60_000
BUSY_TIMEOUT_S = 60


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """What a database raises, as one RunError that does not show the password."""
    shown = re.sub(r"(//[^:/@]*):[^@]*@", r"\1:…@", url)
    try:
        yield
    except ImportError as error:
        raise RunError(f"the storage {shown} needs a database driver that is not installed: {error}") from error
    except FileNotFoundError as error:
        raise RunError(f"the storage {shown} cannot be used: there is no directory {error.filename}") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise RunError(f"the storage {shown} cannot be used: {cause}") from error


class FastStorage(RDBStorage):
    """Optuna's database storage, writing a trial's parameters in one statement, and its attributes in another.

    The original asks the database for each of them whether the trial may still be written and whether it is there
    already, or earlier trials knew the same choices: 0.16 s for a trial of 125 parameters, against 0.02 s. Here a trial
    is written once and the study says which choices it was made for. Where Optuna renames what is replaced here, the
    original comes back, and is only slower.
    """

    def _set_trial_param_without_commit(
        self,
        session: Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,  # noqa: ARG002 (the check that is left out)
    ) -> None:
        session.add(
            models.TrialParamModel(
                trial_id=trial_id,
                param_name=param_name,
                param_value=param_value_internal,
                distribution_json=distribution_to_json(distribution),
            )
        )

    def _set_trial_attr_without_commit(
        self,
        session: Session,
        model_cls: type[models.TrialUserAttributeModel | models.TrialSystemAttributeModel],
        trial_id: int,
        key: str,
        value: Any,
    ) -> None:
        session.add(model_cls(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def open_storage(url: str) -> RDBStorage:
    """The storage behind `url`; SQLite waits for another process's commit for up to BUSY_TIMEOUT_S seconds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with storage_errors(url):
        if not url.startswith("sqlite"):
            return FastStorage(url)
        _create_sqlite(url)
        return FastStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT_S}})


def _create_sqlite(url: str) -> None:
    """Let a new database file appear with all its tables: two processes that create them in place fail each other."""
    parsed = make_url(url.replace("{{", "{").replace("}}", "}"))
    if parsed.database in (None, "", ":memory:") or parsed.query or os.path.exists(parsed.database):
        return
    final = Path(parsed.database)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".study-") as folder:
        empty = Path(folder) / "study.db"
        close_storage(RDBStorage("sqlite:///" + str(empty).replace("{", "{{").replace("}", "}}")))
        try:
            os.link(empty, final)
        except FileExistsError:
            return  # another process was first
        except OSError:  # a file system without links
            empty.rename(final)


def close_storage(storage: RDBStorage) -> None:
    """Give all connections back."""
    storage.remove_session()
    storage.engine.dispose()


@contextlib.contextmanager
def existing(url: str, name: str) -> Iterator[optuna.Study | None]:
    """The study `name`, None where the storage has none; its connections are closed afterwards."""
    storage = open_storage(url)
    try:
        with storage_errors(url):
            try:
                study: optuna.Study | None = optuna.load_study(study_name=name, storage=storage)
            except KeyError:
                study = None
            yield study
    finally:
        close_storage(storage)


def read_trials(url: str, name: str) -> list[Trial]:
    """All finished trials of a study in number order; none where there is no such study."""
    with existing(url, name) as study:
        frozen = study.get_trials(deepcopy=False) if study else []
    return [decode(t) for t in frozen if t.state.is_finished()]


def read_values(url: str, name: str) -> list[tuple[Trial, dict[str, Choice]]]:
    """All finished trials of a study in number order, each with the values it was made from."""
    with existing(url, name) as study:
        frozen = study.get_trials(deepcopy=False) if study else []
    return [(decode(t), dict(t.params)) for t in frozen if t.state.is_finished()]


def count_trials(url: str, name: str) -> int:
    """How many trials of a study are finished."""
    with existing(url, name) as study:
        return sum(t.state.is_finished() for t in study.get_trials(deepcopy=False)) if study else 0


def read_attributes(url: str, name: str) -> dict[str, Any]:
    """The study's own attributes.

    Raises:
        RunError: the storage has no such study.
    """
    with existing(url, name) as study:
        if study is None:
            raise RunError(f"the storage has no study {name!r}")
        return dict(study.user_attrs)


def encode(
    trial: Trial,
    values: Values,
    distributions: Mapping[str, BaseDistribution],
    objectives: Sequence[str],
    violations: Mapping[str, float],
    system: Mapping[str, Any],
    token: str,
) -> FrozenTrial:
    """A finished trial in Optuna's form, not yet numbered.

    A score that lacks one of the objectives is no point of the search: Optuna gets it as failed, with the reason.
    `token` is how the writer finds its trial's number again.
    """
    axes = parse_objectives(objectives)
    figures = [None if trial.score is None else axis.value(trial.score) for axis in axes]
    numbers = [value for value in figures if value is not None]
    complete = len(numbers) == len(figures)
    plain = dataclasses.replace(trial, number=-1, measurement=None)
    attributes: dict[str, Any] = {"trial": dump(plain, SCHEMA), "token": token}
    if trial.measurement is not None:
        text = json.dumps(to_json(trial.measurement), separators=(",", ":"))
        for i in range(0, len(text), CHUNK):
            attributes[f"measurement:{i // CHUNK}"] = text[i : i + CHUNK]
    frozen = create_trial(
        state=TrialState.COMPLETE if complete else TrialState.FAIL,
        values=numbers if complete else None,
        params=dict(values),
        distributions=dict(distributions),
        user_attrs=attributes,
        system_attrs=dict(system) if complete else {"fail_reason": _reason(trial, objectives, figures)},
        constraints=dict(violations) if complete else None,
    )
    assert frozen.datetime_complete is not None
    frozen.datetime_start = frozen.datetime_complete - timedelta(seconds=sum(trial.seconds.values()))
    return frozen


def decode(frozen: FrozenTrial) -> Trial:
    """The Trial that was written, with its number in the record.

    Raises:
        RunError: the trial was not written by autocompress.
    """
    data = frozen.user_attrs.get("trial")
    if data is None:
        raise RunError(f"trial {frozen.number} of the study was not written by autocompress: use a study of its own")
    chunks = sorted(
        (int(key.partition(":")[2]), text) for key, text in frozen.user_attrs.items() if key.startswith("measurement:")
    )
    if chunks:
        data = data | {"measurement": json.loads("".join(text for _, text in chunks))}
    return dataclasses.replace(load(Trial, data, SCHEMA), number=frozen.number)


def _reason(trial: Trial, objectives: Sequence[str], figures: Sequence[float | None]) -> str:
    if isinstance(trial.outcome, Failure):
        return f"{trial.outcome.stage}: {trial.outcome.message}"
    missing = [name for name, value in zip(objectives, figures, strict=True) if value is None]
    return f"not measured: {', '.join(missing)}"

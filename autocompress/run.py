"""A run: a directory with everything one search knows, readable while it goes on and after.

::

    run/run.json        what was searched for (RunConfig)
    run/study.db        the record: every finished trial (elsewhere where --storage names a database)
    run/log.jsonl       what happened, one JSON object a line
    run/claims/         what processes of this search are working on
    run/artifacts/      model files by candidate digest
    run/data/           inputs of the splits as .npy, for the device
    run/final.json      the front, measured again in fresh processes
    run/lock            held by the process that searches
"""

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from autocompress.core.errors import InputError, RunError
from autocompress.core.front import Front, Limits, judged
from autocompress.core.profile import Profile
from autocompress.core.record import RARE, dump, load, to_json
from autocompress.core.space import SpaceRules
from autocompress.core.trial import Trial

SCHEMA = 1
LIBRARIES = (
    "numpy", "torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "ai-edge-litert",
    "litert-torch", "litert-quantizer", "tensorrt", "optuna",
)  # fmt: skip
Fidelity = Literal["oneshot", "recover"]
Sampler = Literal["surrogate", "nsga2", "tpe", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What a search was started with.

    Attributes:
        task: the reference the task was loaded from; None for a Task handed over in Python.
        recover_steps: training steps of a full recovery; 0 where fidelity is oneshot, or where it is not decided yet.
        trials: budget, all trials of the record counted; None is no limit.
        storage: database URL as given; None is study.db in the run, wherever the run is moved.
        versions: of autocompress, Python and the libraries.
        created: UTC, ISO 8601.
        sampler: what proposes candidates.
        warm_start: directory of the run whose weights and candidates this one begins with.
        around: numbers of that run's trials; where there are any, the search begins with these only.
        model: digest of the original's weights; empty where it was not taken.
    """

    task: str | None
    task_name: str
    profile: Profile
    rules: SpaceRules
    objectives: tuple[str, ...]
    limits: Limits
    fidelity: Fidelity
    recover_steps: int
    seed: int
    trials: int | None
    timeout_s: float | None
    storage: str | None
    study: str
    versions: Mapping[str, str]
    created: str
    sampler: Sampler = field(default="surrogate", metadata=RARE)
    warm_start: str | None = field(default=None, metadata=RARE)
    around: tuple[int, ...] = field(default=(), metadata=RARE)
    model: str = field(default="", metadata=RARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory. `path` is absolute."""

    path: Path
    config: RunConfig

    @classmethod
    def create(cls, path: Path | str, config: RunConfig) -> "Run":
        """A new run in a directory that is not there yet, or empty.

        Raises:
            RunError: there is a run already, or something else.
        """
        folder = Path(path).resolve()
        refuse_existing(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("artifacts", "data"):
                (folder / name).mkdir()
            write_json(folder / "run.json", dump(config, SCHEMA))
        except OSError as error:
            raise RunError(f"cannot make a run at {path}: {error.strerror}") from error
        return cls(path=folder, config=config)

    def decided(self, **changes: Any) -> "Run":
        """The same run with terms that were open until it began, written into its run.json."""
        config = replace(self.config, **changes)
        write_json(self.path / "run.json", dump(config, SCHEMA))
        return replace(self, config=config)

    @property
    def artifacts(self) -> Path:
        """Where model files are."""
        return self.path / "artifacts"

    @property
    def data(self) -> Path:
        """Where the splits' inputs are."""
        return self.path / "data"

    @property
    def storage(self) -> str:
        """URL of the database that holds the record."""
        if self.config.storage is not None:
            return self.config.storage
        # Optuna fills `{}` fields in a URL.
        return f"sqlite:///{self.path / 'study.db'}".replace("{", "{{").replace("}", "}}")

    def trials(self) -> list[Trial]:
        """All finished trials, in number order."""
        if self._unborn():
            return []
        from autocompress.optimize.record import read_trials

        return read_trials(self.storage, self.config.study)

    def front(self) -> Front:
        """The front as measured again at the end, ties merged, or, while trials are newer, of those of the top rung."""
        final = self.final()
        if final is not None:
            return Front.of(final, self.config.objectives).merged()
        return Front.of(judged(self.trials()), self.config.objectives)

    def final(self) -> list[Trial] | None:
        """What `write_final` wrote; None where it was not, or trials were added since."""
        try:
            data = json.loads((self.path / "final.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        final = load(_Final, data, SCHEMA)
        return list(final.trials) if final.covers == self._count() else None

    def write_final(self, trials: Sequence[Trial]) -> None:
        """Keep the front and the baselines as measured again; valid until the record has another trial."""
        final = _Final(covers=self._count(), trials=tuple(trials))
        write_json(self.path / "final.json", dump(final, SCHEMA))

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl, whole, whoever else writes."""
        line = {"time": utc_now(), "event": event, "process": os.getpid(), **to_json(fields)}
        with (self.path / "log.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run; it is let go of with the process, however that ends.

        Raises:
            RunError: another process holds it.
        """
        with (self.path / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunError(f"{self.path} is in use by process {holder}: wait for it or stop it") from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _count(self) -> int:
        if self._unborn():
            return 0
        from autocompress.optimize.record import count_trials

        return count_trials(self.storage, self.config.study)

    def _unborn(self) -> bool:
        """Whether nothing was ever recorded; opening the database would create it."""
        return self.config.storage is None and not (self.path / "study.db").exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Final:
    """`covers`: how many trials the record had."""

    covers: int
    trials: tuple[Trial, ...]


def open_run(path: Path | str) -> Run:
    """The run in a directory.

    Raises:
        RunError: the directory is no run, or one that this version cannot read.
    """
    folder = Path(path).resolve()
    try:
        data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "it has no run.json" if folder.is_dir() else "there is no such directory"
        raise RunError(f"{path} is no run: {reason}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is no run: its run.json is not JSON ({error})") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return Run(path=folder, config=load(RunConfig, data, SCHEMA))
    except InputError as error:
        raise RunError(f"{path}: {error}") from error


def refuse_existing(path: Path | str) -> None:
    """Raise RunError where a new run cannot be made because something is there."""
    folder = Path(path).resolve()
    if (folder / "run.json").exists():
        raise RunError(f"{path} is a run already: continue it with --resume (resume=True), or name another")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{path} is not empty: a run needs a directory of its own, name another")


def library_versions() -> dict[str, str]:
    """Versions of autocompress, Python and the libraries that are installed, without importing them."""
    from autocompress import __version__

    found = {"autocompress": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def utc_now() -> str:
    """Now, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_json(path: Path, data: Any) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

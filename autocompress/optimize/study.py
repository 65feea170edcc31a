"""One search's study: what was tried, and what to try next.

The record is an Optuna study in a database. Asking happens on a mirror of it in memory, so that a search over
hundreds of variables costs one transaction a trial, several workers share what each has finished, and a killed
process leaves nothing behind that looks as if it were still running.
"""

import itertools
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.core.errors import InputError, RunError, unknown
from autocompress.core.front import parse_objectives
from autocompress.core.record import to_json
from autocompress.core.space import Choice, Values
from autocompress.core.trial import Trial
from autocompress.optimize.claims import Claims
from autocompress.optimize.nsga2 import POPULATION, Nsga2, generation_key
from autocompress.optimize.record import close_storage, decode, encode, open_storage, storage_errors
from autocompress.optimize.sampler import Guide, SurrogateSampler

SAMPLE_ATTEMPTS = 16
SYNC_S = 0.5  # what other workers finished since so long ago is known before asking
NEIGHBOUR_ATTEMPTS = 96
ENUMERATE_UP_TO = 4096
SAMPLERS = ("surrogate", "nsga2", "tpe", "random")


class Study:
    """Asks a sampler over the record, and writes each finished trial durably in one step.

    Args:
        storage: database URL; created when it is not there.
        name: the study's name in it.
        objectives: names from `core.front.OBJECTIVES`.
        variables: choices by variable name.
        digest: identity of what values mean; two with the same digest are duplicates.
        seed: of the sampler. A resumed study goes on with other random numbers.
        sampler: a name of SAMPLERS. It learns from one-shot trials and baselines only.
        claims: folder in which the processes of one search tell each other what they are at; None for one process.
        attributes: written into the study for whoever opens it, such as the path of the run.

    Raises:
        RunError: the storage cannot be used, or the study in it was made for other variables or objectives.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        objectives: Sequence[str],
        variables: Mapping[str, tuple[Choice, ...]],
        *,
        digest: Callable[[Values], str],
        seed: int,
        sampler: str = "surrogate",
        population: int = POPULATION,
        claims: Path | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise InputError(unknown("sampler", sampler, SAMPLERS))
        self.name = name
        self.objectives = tuple(objectives)
        self.variables = dict(variables)
        self._url = storage
        self._digest = digest
        self._distributions = {key: CategoricalDistribution(choices) for key, choices in variables.items()}
        directions = [
            StudyDirection.MAXIMIZE if o.maximize else StudyDirection.MINIMIZE for o in parse_objectives(objectives)
        ]
        self._storage = open_storage(storage)
        with storage_errors(storage):
            self._record = optuna.create_study(
                storage=self._storage, study_name=name, directions=directions, load_if_exists=True
            )
            self._check_or_describe(dict(attributes or {}))
            written = len(self._record.get_trials(deepcopy=False))
        self._random = random.Random(seed + 7919 * written)
        self._sampler = self._made(sampler, self._random.getrandbits(31), population)
        self._mirror = optuna.create_study(directions=directions, sampler=self._sampler)
        self._trials: dict[int, Trial] = {}
        self._numbers: dict[str, int] = {}
        self._queue: deque[dict[str, Choice]] = deque()
        self._synced = -math.inf
        self._asked: dict[str, int] = {}
        self._values: dict[int, dict[str, Choice]] = {}
        self._claims = None if claims is None else Claims(claims)
        self._seen: set[str] = set()
        self._sync()

    def __len__(self) -> int:
        """How many trials are finished, by any process."""
        self._sync()
        return len(self._trials)

    def trials(self) -> list[Trial]:
        """All finished trials, whoever wrote them, in number order."""
        self._sync()
        return self.known

    @property
    def known(self) -> list[Trial]:
        """The trials as they were when this study last looked, asked or told; costs no query."""
        return [self._trials[number] for number in sorted(self._trials)]

    def enqueue(self, values: Values) -> None:
        """Ask for these values before the sampler is asked; a variable not given takes its first choice."""
        full = {name: values.get(name, choices[0]) for name, choices in self.variables.items()}
        for name, value in full.items():
            if value not in self.variables[name]:
                raise InputError(f"`{name}` must be one of {list(self.variables[name])}, got {value!r}")
        self._queue.append(full)

    def guide(self, guide: Guide) -> None:
        """Tell the sampler what is known before the trials say it; those that learn from trials only do not listen."""
        if isinstance(self._sampler, SurrogateSampler):
            self._sampler.guide(guide)

    def _made(self, sampler: str, seed: int, population: int) -> BaseSampler:
        if sampler == "nsga2":
            return Nsga2(seed=seed, population_size=population)
        if sampler == "tpe":
            return TPESampler(seed=seed, multivariate=True)
        if sampler == "random":
            return RandomSampler(seed=seed)
        return SurrogateSampler(self.variables, self.objectives, seed=seed, pending=self._tried_elsewhere)

    def _tried_elsewhere(self) -> list[Values]:
        """What others ask for; what they bring to another rung is in the record already."""
        theirs = {} if self._claims is None else self._claims.of_others()
        return [values for key, values in theirs.items() if values and self._digest(values) == key]

    def values(self, number: int) -> dict[str, Choice]:
        """The values that a finished trial was made from."""
        return dict(self._values[number])

    def claim(self, key: str, values: Values) -> bool:
        """Whether `key` is this process's to do now; False where another one is at it."""
        return self._claims is None or self._claims.claim(key, values)

    def release(self, key: str) -> None:
        """Let go of a claim."""
        if self._claims is not None:
            self._claims.release(key)

    def claimed(self) -> set[str]:
        """Keys that other processes are at."""
        return set() if self._claims is None else set(self._claims.of_others())

    def ask(self) -> dict[str, Choice] | None:
        """Values that mean a candidate never tried or asked for; None when there is none left.

        First what was enqueued, then the sampler's proposals, then random neighbours of the front. Where nothing is
        found, it looks once more at what other processes let go of.
        """
        if (values := self._ask()) is not None:
            return values
        self._sync()
        return self._ask()

    def _ask(self) -> dict[str, Choice] | None:
        if time.monotonic() - self._synced > SYNC_S:
            self._sync()
        while self._queue:
            values = self._queue.popleft()
            if self._fresh(values):
                self._mirror.enqueue_trial(values)
                return self._take(self._sample())
        if not self.variables:
            return self._take({}) if self._fresh({}) else None
        for _ in range(SAMPLE_ATTEMPTS):
            values = self._sample()
            if self._fresh(values):
                return self._take(values)
        fresh = self._neighbour() or self._any()
        return None if fresh is None else self._take(fresh)

    def tell(self, trial: Trial, values: Values, violations: Mapping[str, float]) -> Trial:
        """Write a finished trial; it is on disk, whole, when this returns. Gives it back with its number.

        A violation that is not finite was not measured: it cannot steer, and is not written.
        """
        digest = self._digest(values)
        generation = self._asked.pop(digest, 0)
        learned = trial.rung == "oneshot" and trial.role != "uniform-int8"
        system = {generation_key(): generation} if learned else {}
        token = uuid.uuid4().hex
        frozen = encode(
            trial,
            values,
            {name: self._distributions[name] for name in values},
            self.objectives,
            {name: value for name, value in violations.items() if math.isfinite(value)},
            system,
            token,
        )
        with storage_errors(self._url):
            self._record.add_trial(frozen)
        self._sync()
        self.release(digest)
        return self._trials[self._numbers[token]]

    def close(self) -> None:
        """Give the database connections back."""
        if self._claims is not None:
            self._claims.close()
        close_storage(self._storage)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_or_describe(self, attributes: dict[str, Any]) -> None:
        """A study is made for one set of variables and objectives, and says so in its attributes."""
        wanted = {"variables": to_json(self.variables), "objectives": list(self.objectives)}
        known = self._record.user_attrs
        for key, value in wanted.items():
            if key in known and known[key] != value:
                raise RunError(
                    f"the study {self.name!r} was made for other {key}: resume it with the model, space and target "
                    "it was started with, or name another study"
                )
        for key, value in (attributes | wanted).items():
            if known.get(key) != value:
                self._record.set_user_attr(key, value)

    def _sync(self) -> None:
        """Take over what was finished since, here or elsewhere."""
        self._synced = time.monotonic()
        with storage_errors(self._url):
            written = self._record.get_trials(deepcopy=False)
        for frozen in written:
            if frozen.number not in self._trials and frozen.state.is_finished():
                self._absorb(frozen)

    def _absorb(self, frozen: FrozenTrial) -> None:
        trial = decode(frozen)
        self._trials[trial.number] = trial
        self._numbers[frozen.user_attrs.get("token", "")] = trial.number
        self._values[trial.number] = dict(frozen.params)
        if trial.rung != "oneshot":
            return
        if trial.role != "uniform-int8":
            self._seen.add(trial.candidate.digest)
        if trial.role == "candidate":
            self._seen.add(self._digest(frozen.params))
        # The vendor's own file is no lowering of ours: breeding from it would expect what we cannot make.
        if frozen.state == TrialState.COMPLETE and trial.role != "uniform-int8":
            self._mirror.add_trial(
                create_trial(
                    values=frozen.values,
                    params=frozen.params,
                    distributions=frozen.distributions,
                    system_attrs=frozen.system_attrs,
                )
            )

    def _sample(self) -> dict[str, Choice]:
        """What the sampler proposes. The mirror's own trial ends here: the finished one comes from the record."""
        asked = self._mirror.ask(dict(self._distributions))
        self._mirror.tell(asked, state=TrialState.FAIL)
        return dict(asked.params)

    def _fresh(self, values: Values) -> bool:
        """Whether nobody has tried or is trying that; what is fresh is this process's from now on."""
        digest = self._digest(values)
        return digest not in self._seen and self.claim(digest, values)

    def _take(self, values: dict[str, Choice]) -> dict[str, Choice]:
        digest = self._digest(values)
        self._seen.add(digest)
        self._asked[digest] = getattr(self._sampler, "generation", 0)
        return values

    def _neighbour(self) -> dict[str, Choice] | None:
        """A member of the front with a few variables drawn anew, ever more of them as attempts fail."""
        front = [dict(t.params) for t in self._mirror.best_trials if t.params] or [
            {name: choices[0] for name, choices in self.variables.items()}
        ]
        for attempt in range(NEIGHBOUR_ATTEMPTS):
            values = dict(self._random.choice(front))
            count = min(1 + attempt // 8, len(self.variables))
            for name in self._random.sample(sorted(self.variables), count):
                values[name] = self._random.choice(self.variables[name])
            if self._fresh(values):
                return values
        return None

    def _any(self) -> dict[str, Choice] | None:
        """Any candidate not seen, by going through a space small enough for that."""
        if math.prod(len(choices) for choices in self.variables.values()) > ENUMERATE_UP_TO:
            return None
        points = list(itertools.product(*self.variables.values()))
        self._random.shuffle(points)
        for point in points:
            values = dict(zip(self.variables, point, strict=True))
            if self._fresh(values):
                return values
        return None

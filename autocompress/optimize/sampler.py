"""The sampler of a search: neighbours of the front, screened by what a surrogate expects of them.

Candidates are mutations and crossings of the front's members and the best policies by the surrogate's sum of single
choices. The one with the largest expected hypervolume improvement is proposed (Emmerich et al., 2006).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.core.front import nondominated
from autocompress.core.space import Choice, Values
from autocompress.optimize.surrogate import NEAREST, Additive, Array, Encoding, Process, expected_gain, nearest

MUTATIONS, CROSSINGS, POLICIES = 96, 48, 16  # candidates of each kind that are looked at
MOST_CHANGED = 4  # variables that a mutation changes
NEIGHBOUR = 0.7  # of the changes of a number are to the next one
FEWEST_TRIALS = 6  # before, a crossing of what is known is as good a guess
LOGARITHMIC = {"latency", "size", "memory", "energy"}
SCALE = 0.1  # of an accuracy's loss, beyond which its logarithm counts, where no bound gives one


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What is known before the trials say anything.

    Attributes:
        effects: by variable and choice as text, the change of the outputs and of the latency.
        bounds: by objective, the worst value that is of any use; the front is sought within.
        best_accuracy: of the original; losses are counted from there.
        blocks: by layer, the block whose precision it takes over.
    """

    effects: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    best_accuracy: float | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)


class SurrogateSampler(BaseSampler):
    """Proposes by a surrogate; learns each trial once.

    Args:
        variables: choices by name; numbers are in order.
        objectives: names, in the order of the study's values.
        seed: of its random numbers.
        pending: gives the values that others are evaluating now.
    """

    def __init__(
        self,
        variables: Mapping[str, tuple[Choice, ...]],
        objectives: Sequence[str],
        *,
        seed: int,
        pending: Callable[[], Sequence[Values]] = lambda: (),
    ) -> None:
        self._variables = dict(variables)
        self._objectives = tuple(objectives)
        self._pending = pending
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._distributions = {name: CategoricalDistribution(choices) for name, choices in variables.items()}
        self._ranked: list[dict[str, Choice]] = []
        self._ranked_at = -1
        self.guide(Guide())

    def guide(self, guide: Guide) -> None:
        """Begin anew with other knowledge; trials are learned again when they are next needed."""
        self._guide = guide
        self._encoding = Encoding(self._variables, guide.blocks)
        self._additive = Additive(self._encoding, guide.effects)
        self._rows: NDArray[np.intp] = np.empty((0, len(self._encoding.starts) - 1), np.intp)
        self._losses: Array = np.empty((0, len(self._objectives)))
        self._feasible: list[bool] = []
        self._values: list[dict[str, Choice]] = []
        self._learned: set[int] = set()
        self._known: set[bytes] = set()
        self._ranked_at = -1

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002 (Optuna's signature)
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """All variables, from the first trial on."""
        return dict(self._distributions)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002 (Optuna's signature)
    ) -> dict[str, Any]:
        """The best candidate not proposed yet since the last trial was learned."""
        if trial.system_attrs.get("fixed_params"):
            return {}
        self._take_up(study)
        if self._ranked_at != len(self._learned) or not self._ranked:
            self._ranked = self._rank()
            self._ranked_at = len(self._learned)
        return dict(self._ranked.pop()) if self._ranked else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random: there is nothing to go by."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _take_up(self, study: Study) -> None:
        """Learn the trials that were finished since."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        new = [t for t in complete if t.number not in self._learned and t.params.keys() == self._variables.keys()]
        self._learned.update(t.number for t in complete)
        if not new:
            return
        signs = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions])
        losses = np.array([t.values for t in new]) * signs
        for k, name in enumerate(self._objectives):
            if name in LOGARITHMIC:
                losses[:, k] = np.log(np.maximum(losses[:, k], 1e-12))
            else:
                losses[:, k] = self._bent(losses[:, k])
        rows = self._encoding.rows([t.params for t in new])
        self._known.update(row.tobytes() for row in rows)
        self._values += [dict(t.params) for t in new]
        self._feasible += [all(value <= 0 for value in (t.constraints or {}).values()) for t in new]
        self._rows = np.vstack([self._rows, rows])
        self._losses = np.vstack([self._losses, losses])
        self._additive.learn(rows, losses)

    def _scale(self) -> float:
        """The loss of accuracy that matters: twice as much as that is not twice as bad."""
        best = self._guide.best_accuracy
        bound = self._guide.bounds.get("accuracy")
        return SCALE if best is None or bound is None else max(best - bound, 1e-6)

    def _bent(self, loss: Any) -> Any:
        """Accuracy's loss, negated accuracy, on a scale that is even for small losses and slow for large ones."""
        scale = self._scale()
        lost = loss + (self._guide.best_accuracy or 0.0)
        return np.sign(lost) * scale * np.log1p(np.abs(lost) / scale)

    def _reference(self) -> Array:
        """The worst of what is of use, of each objective: as the bounds say, or the worst known."""
        worst = self._losses.max(0)
        for k, name in enumerate(self._objectives):
            if name in self._guide.bounds:
                bound = self._guide.bounds[name]
                worst[k] = np.log(max(bound, 1e-12)) if name in LOGARITHMIC else self._bent(-bound)
        found: Array = worst
        return found

    def _rank(self) -> list[dict[str, Choice]]:
        """Candidates, the best one last."""
        if len(self._values) < FEWEST_TRIALS:
            return self._shuffled(self._crossings(self._parents(), CROSSINGS))
        parents = self._parents()
        candidates = self._mutations(parents, MUTATIONS) + self._crossings(parents, CROSSINGS)
        policies = self._policies()
        candidates += policies + self._mutations(policies, POLICIES)
        rows = self._encoding.rows(candidates)
        fresh = {key: i for i, row in enumerate(rows) if (key := row.tobytes()) not in self._known}
        if not fresh:
            return self._shuffled(candidates)
        chosen = list(fresh.values())
        gains = self._gains(rows[chosen])
        return [candidates[chosen[i]] for i in np.argsort(gains, kind="stable")]

    def _gains(self, rows: NDArray[np.intp]) -> Array:
        losses, reference = self._losses, self._reference()
        some = nearest(losses, NEAREST)
        process = Process(self._rows[some], losses[some] - self._additive.predict(self._rows[some]))
        believed = process.predict(rows)
        believed.mean[:] += self._additive.predict(rows)
        front = self._losses[self._usable()]
        if pending := [v for v in self._pending() if v.keys() == self._variables.keys()]:
            theirs = self._encoding.rows(pending)
            front = np.vstack([front, self._additive.predict(theirs) + process.predict(theirs).mean])
        # Per objective one unit is what separates the reference from the best: no objective counts for more.
        best = losses.min(0)
        unit = np.maximum(reference - best, 1e-9)
        believed.mean[:] = (believed.mean - best) / unit
        believed.deviation[:] = believed.deviation / unit
        return expected_gain(believed, (front - best) / unit, (reference - best) / unit)

    def _usable(self) -> NDArray[np.bool_]:
        """Feasible trials, all where none is."""
        feasible = np.array(self._feasible)
        return feasible if feasible.any() else np.ones(len(feasible), bool)

    def _parents(self) -> list[dict[str, Choice]]:
        """The front of what is usable and within the bounds, as far as there is any."""
        if not self._values:
            return [{name: choices[0] for name, choices in self._variables.items()}]
        numbers = np.flatnonzero(self._usable())
        within = numbers[(self._losses[numbers] <= self._reference()).all(1)]
        numbers = within if len(within) else numbers
        on = numbers[nondominated(self._losses[numbers])]
        return [self._values[i] for i in on[np.argsort(self._losses[on, -1], kind="stable")]]

    def _mutations(self, parents: Sequence[Mapping[str, Choice]], count: int) -> list[dict[str, Choice]]:
        """Parents in turn, a few variables of each changed."""
        names = list(self._variables)
        found = []
        for i in range(count):
            values = dict(parents[i % len(parents)])
            changed = min(int(self._rng.geometric(0.5)), MOST_CHANGED)
            for j in self._rng.integers(len(names), size=changed).tolist():
                values[names[j]] = self._other(names[j], values[names[j]])
            found.append(values)
        return found

    def _other(self, name: str, now: Choice) -> Choice:
        choices = self._variables[name]
        place = choices.index(now)
        ordered = all(isinstance(c, int | float) for c in choices)
        if ordered and self._rng.random() < NEIGHBOUR:
            steps = [i for i in (place - 1, place + 1) if 0 <= i < len(choices)]
            return choices[steps[int(self._rng.integers(len(steps)))]]
        others = [i for i in range(len(choices)) if i != place]
        return choices[others[int(self._rng.integers(len(others)))]]

    def _crossings(self, parents: Sequence[Mapping[str, Choice]], count: int) -> list[dict[str, Choice]]:
        """Two neighbours on the front, each variable from one of them; a lone parent is mutated."""
        if len(parents) < 2:
            return self._mutations(parents, count)
        found = []
        for i in range(count):
            first = i % len(parents)
            second = min(len(parents) - 1, max(0, first + int(self._rng.choice([-2, -1, 1, 2]))))
            one, other = parents[first], parents[second]
            mask = self._rng.random(len(self._variables)) < 0.5
            found.append({n: (one if m else other)[n] for n, m in zip(self._variables, mask, strict=True)})
        return found

    def _policies(self) -> list[dict[str, Choice]]:
        """What the sum of single choices thinks best, for as many weights of the objectives."""
        unit = np.maximum(self._reference() - self._losses.min(0), 1e-9)
        base = self._parents()
        around = self._encoding.rows(base)
        found = []
        for weight in self._rng.dirichlet(np.ones(len(self._objectives)), POLICIES):
            values = dict(base[int(self._rng.integers(len(base)))])
            found.append(values | self._encoding.best(self._additive.single(weight / unit, around)))
        return found

    def _shuffled(self, candidates: list[dict[str, Choice]]) -> list[dict[str, Choice]]:
        return [candidates[i] for i in self._rng.permutation(len(candidates))]

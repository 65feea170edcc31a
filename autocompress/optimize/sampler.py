"""The sampler of a search: neighbours of the front, screened by what a surrogate expects of them.

Candidates are mutations and crossings of the front's members, the best policies by the surrogate's sum of single
choices, and mutations of the best of those. The one with the largest expected hypervolume improvement is proposed
(Emmerich et al., 2006).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.core.space import Choice, Values
from autocompress.optimize.encoding import Array, Encoding, Rows
from autocompress.optimize.improvement import Believed, Members, Region, nearest
from autocompress.optimize.proposals import crossings, mixed, mutations
from autocompress.optimize.surrogate import Fit, Surrogate

MUTATIONS, CROSSINGS, POLICIES = 64, 48, 40  # candidates of each kind that are looked at first
CLIMBS, CLIMBERS, CLIMBED = 2, 12, 72  # times that the best so many are mutated, to so many
PROPOSALS = 32  # kept for when the first ones mean what is known already
NEAREST = 160  # trials that the process is of
FEWEST_TRIALS = 6  # before, a crossing of what is known is as good a guess
LOGARITHMIC = {"latency", "size", "memory", "energy"}
BEND = 0.1  # of the loss of accuracy at which nothing is of use any more, beyond which its logarithm counts
SCALE = 0.01  # the same where no bound is given
# Of a standard deviation, what counts in an expected gain: a tenth, and every third time all of it. With all of it
# always, what little is known of was tried before what promises most, and hypervolumes after 100 trials were lower
# (emulated ResNet, five seeds: 0.0525, 0.0559); with a tenth always, wrong effects could mislead for good.
DOUBT, DOUBTED = 0.1, 3
MARGIN = 0.1  # of the front's extent that the reference is beyond it, where no bound gives one


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
        self._logarithmic = np.array([name in LOGARITHMIC for name in objectives])
        self._pending = pending
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._distributions = {name: CategoricalDistribution(choices) for name, choices in variables.items()}
        self.guide(Guide())

    def guide(self, guide: Guide) -> None:
        """Begin anew with other knowledge; trials are learned again when they are next needed."""
        self._guide = guide
        self._best = guide.best_accuracy
        self._encoding = Encoding(self._variables, guide.blocks)
        self._surrogate = Surrogate(self._encoding, guide.effects, len(self._objectives))
        self._numbers: Rows = np.empty((0, len(self._variables)), np.intp)
        self._losses: Array = np.empty((0, len(self._objectives)))  # in their own units
        self._violations: Array = np.empty(0)
        self._front = {True: Members(), False: Members()}  # of those that meet the limits, of the others
        self._known: set[bytes] = set()
        self._learned: set[int] = set()
        self._start = 0  # of the study's trials, the first that may not be finished
        self._ranked: list[Rows] = []
        self._ranked_at = -1
        self._doubt = 1.0

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
            self._ranked = list(self._rank()[:PROPOSALS][::-1])
            self._ranked_at = len(self._learned)
        return self._encoding.values(self._ranked.pop())

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random: there is nothing to go by."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _take_up(self, study: Study) -> None:
        """Learn the trials that were finished since."""
        trials = study.get_trials(deepcopy=False)[self._start :]
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.number not in self._learned]
        self._start += next((i for i, t in enumerate(trials) if not t.state.is_finished()), len(trials))
        self._learned.update(t.number for t in complete)
        new = [t for t in complete if t.params.keys() == self._variables.keys()]
        if not new:
            return
        signs = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions])
        losses = np.array([t.values for t in new]) * signs
        if self._best is None and "accuracy" in self._objectives:
            self._best = -float(losses[:, self._objectives.index("accuracy")].min())
        numbers = self._encoding.numbers([t.params for t in new])
        rows = self._encoding.columns(numbers)
        violations = np.array([sum(max(v, 0.0) for v in t.constraints.values()) for t in new])
        for i, (loss, violation) in enumerate(zip(losses, violations, strict=True)):
            self._front[bool(violation <= 0)].add(len(self._losses) + i, loss)
        self._known.update(row.tobytes() for row in rows)
        self._numbers = np.vstack([self._numbers, numbers])
        self._losses = np.vstack([self._losses, losses])
        self._violations = np.concatenate([self._violations, violations])
        self._surrogate.learn(rows, self._bent(losses))

    def _scale(self) -> float:
        """The loss of accuracy that matters: twice as much as that is not twice as bad."""
        best, bound = self._best, self._guide.bounds.get("accuracy")
        return SCALE if best is None or bound is None else BEND * max(best - bound, 1e-6)

    def _bent(self, losses: Array) -> Array:
        """What the surrogate learns: logarithms of costs; accuracy's loss, even while small and slow when large."""
        lost, scale = losses + (self._best or 0.0), self._scale()
        bent = np.sign(lost) * scale * np.log1p(np.abs(lost) / scale)
        return np.where(self._logarithmic, np.log(np.maximum(losses, 1e-12)), bent)

    def _straight(self, believed: Believed, reference: Array) -> Believed:
        """Back in the objectives' own units, along the tangent at the mean, or at the reference where that is worse.

        What is beyond the reference is only of interest for its chance to be within.
        """
        at = np.minimum(believed.mean, self._bent(reference[None]))
        scale = self._scale()
        cost = np.exp(np.where(self._logarithmic, at, 0.0))
        grown = np.exp(np.where(self._logarithmic, 0.0, np.abs(at) / scale))
        value = np.where(self._logarithmic, cost, np.sign(at) * scale * (grown - 1) - (self._best or 0.0))
        slope = np.where(self._logarithmic, cost, grown)
        return Believed(mean=value + slope * (believed.mean - at), deviation=self._doubt * slope * believed.deviation)

    def _rank(self) -> Rows:
        """Candidates that nobody proposed, the best one first; any where there is none."""
        rng, encoding = self._rng, self._encoding
        if not len(self._numbers):
            return rng.integers(0, encoding.sizes, (PROPOSALS, len(encoding.sizes)))
        front = self._parents()
        parents = self._numbers[front]
        found = self._near(parents, MUTATIONS, CROSSINGS)
        if len(self._numbers) < FEWEST_TRIALS:
            fresh = self._fresh(found, set())
            return rng.permutation(fresh if len(fresh) else found)
        near = np.arange(len(self._losses))
        if len(near) > NEAREST:
            near = nearest(self._surrogate.losses, self._surrogate.losses[front], NEAREST)
        fit = self._surrogate.fit(near)
        self._doubt = DOUBT if len(self._losses) % DOUBTED else 1.0
        seen: set[bytes] = set()
        gain = self._gain(fit, front, seen)
        found = self._fresh(np.vstack([found, self._policies(fit, front)]), seen)
        gains = gain(found)
        for _ in range(CLIMBS):
            best = found[np.argsort(-gains, kind="stable")[:CLIMBERS]]
            more = self._fresh(self._near(best, CLIMBED, 0), seen) if len(best) else best
            found, gains = np.vstack([found, more]), np.concatenate([gains, gain(more)])
        order = np.argsort(-gains, kind="stable")
        return found[order] if len(found) else self._near(parents, PROPOSALS, 0)

    def _near(self, parents: Rows, mutated: int, crossed: int) -> Rows:
        """Mutations and crossings of parents in order; a lone parent is mutated only."""
        made = mutations(parents, self._encoding.sizes, self._encoding.ordered, mutated, self._rng)
        if len(parents) < 2 or not crossed:
            return made
        return np.vstack([made, crossings(parents, crossed, self._rng)])

    def _fresh(self, candidates: Rows, seen: set[bytes]) -> Rows:
        """Those that mean what no trial and none in `seen` means, which is extended."""
        keep = []
        for i, row in enumerate(self._encoding.columns(candidates)):
            key = row.tobytes()
            if key not in self._known and key not in seen:
                seen.add(key)
                keep.append(i)
        return candidates[keep]

    def _policies(self, fit: Fit, front: Sequence[int]) -> Rows:
        """What the sum of single choices, or one as likely, thinks best, for as many weights of the objectives."""
        rng, base = self._rng, self._rng.choice(front, POLICIES)
        losses = self._surrogate.losses[front]
        unit = np.maximum(np.ptp(losses, axis=0), 1e-6)
        weights = rng.dirichlet(np.full(losses.shape[1], 0.7), POLICIES) / unit
        draws = rng.standard_normal((POLICIES, fit.size)) * (np.arange(POLICIES) % 4 > 1)[:, None]
        scores = fit.single(weights, self._surrogate.rows[base], draws)
        around = self._numbers[base]
        return mixed(around, self._encoding.best(scores, around), rng)

    def _gain(self, fit: Fit, front: Sequence[int], seen: set[bytes]) -> Callable[[Rows], Array]:
        """What candidates are expected to add to the front; what is pending counts as if it came as predicted.

        Rows of what is pending go into `seen`.
        """
        points, reference = self._losses[front], self._reference(front)
        if theirs := [v for v in self._pending() if v.keys() == self._variables.keys()]:
            rows = self._encoding.rows(theirs)
            seen.update(row.tobytes() for row in rows)
            points = np.vstack([points, self._straight(fit.predict(rows), reference).mean])
        region = Region(points, reference)

        def gain(candidates: Rows) -> Array:
            if not len(candidates):
                return np.empty(0)
            believed = self._straight(fit.predict(self._encoding.columns(candidates)), reference)
            gains = region.expected_gain(believed)
            if gains.any():
                return gains
            short = np.maximum(believed.mean - reference, 0.0) / np.maximum(np.abs(reference), 1e-12)
            missing: Array = -short.sum(1)  # nothing can be of use yet: what is the nearest to that
            return missing

        return gain

    def _reference(self, front: Sequence[int]) -> Array:
        """The worst of what is of use, of each objective: as the bounds say, or a little beyond the front."""
        losses = self._losses[front]
        extent = np.maximum(np.ptp(losses, axis=0), 0.01 * np.abs(losses).max(0) + 1e-12)
        found: Array = losses.max(0) + MARGIN * extent
        for k, name in enumerate(self._objectives):
            if name in self._guide.bounds:
                bound = self._guide.bounds[name]
                found[k] = bound if self._logarithmic[k] else -bound
        return found

    def _parents(self) -> list[int]:
        """The front of what is feasible, as far as it is within the bounds; where nothing is, the nearest to that."""
        front = self._front[True].numbers
        if not front:
            least = np.argsort(self._violations, kind="stable")[:CLIMBERS]
            front = sorted(set(self._front[False].numbers) & set(least.tolist())) or least.tolist()
        reference = self._reference(front)
        rows = np.array(front)
        within = rows[(self._losses[rows] <= reference).all(1)]
        chosen = within if len(within) else rows
        return [int(i) for i in chosen[np.argsort(self._losses[chosen, -1], kind="stable")]]

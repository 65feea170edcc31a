"""What trials teach of the others: a sum of single choices, and a Gaussian process over what that leaves.

All is minimised here. Accuracy is negated; costs are logarithms, since what a choice does to them is a factor.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.front import nondominated
from autocompress.core.space import INHERIT, Choice, Values

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

RIDGE = 0.3  # a choice that was seen once counts for three quarters of what it seems to do
PRIOR_RIDGE = 0.02  # the sums of effects are not shrunk as much: a few coefficients have to learn their scale
SCALES = (0.003, 0.03)  # of the sum of all losses, around which accuracy may give way
LEAST_SHARE = 0.05  # of the latency is left at least, whatever the sum of effects says
NEAREST = 128  # trials that the process is of
LENGTHS = (1.0, 3.0, 10.0)  # of the kernel, in variables that differ
NOISES = (0.05, 0.5)  # share of the residuals' variance that no variable explains
WIDEST_FRONT = 24  # points that boxes are made of with four objectives and more


@dataclass(frozen=True, slots=True, kw_only=True)
class Believed:
    """Means and standard deviations of objectives, `[candidates, objectives]`."""

    mean: Array
    deviation: Array


class Encoding:
    """Values as numbers of choices: one column for each variable, what a layer takes over from its block resolved."""

    def __init__(self, variables: Mapping[str, tuple[Choice, ...]], blocks: Mapping[str, str]) -> None:
        """`blocks` tells each layer's block; a layer whose variable says "block" has the choice of that."""
        self.variables = dict(variables)
        self._of_block = {
            f"layer:{layer}": f"precision:{block}"
            for layer, block in blocks.items()
            if f"layer:{layer}" in variables and f"precision:{block}" in variables
        }
        covered = self._covered(blocks)
        self._columns: dict[str, dict[Choice, int]] = {}
        for name, choices in self.variables.items():
            if name in covered:
                continue
            own = [c for c in choices if not (name in self._of_block and c == INHERIT)]
            if name in self._of_block:
                own += [c for c in self.variables[self._of_block[name]] if c not in own]
            self._columns[name] = {choice: i for i, choice in enumerate(own)}
        self._choices = {name: list(known) for name, known in self._columns.items()}
        sizes = [len(own) for own in self._columns.values()]
        self._places = np.arange(max(sizes, default=0)) < np.array(sizes, np.intp)[:, None]
        self.starts: Rows = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)

    def _covered(self, blocks: Mapping[str, str]) -> set[str]:
        """Blocks whose every layer has a variable of its own: they say nothing that their layers do not."""
        layers: dict[str, list[str]] = {}
        for layer, block in blocks.items():
            layers.setdefault(f"precision:{block}", []).append(f"layer:{layer}")
        return {block for block, own in layers.items() if all(name in self._of_block for name in own)}

    @property
    def size(self) -> int:
        """Columns of a one-hot row."""
        return int(self.starts[-1])

    def rows(self, many: Sequence[Values]) -> Rows:
        """For each of `many`, the one-hot column of each variable, `[many, variables]`."""
        found = np.empty((len(many), len(self._columns)), np.intp)
        for j, (name, known) in enumerate(self._columns.items()):
            first, block = self.variables[name][0], self._of_block.get(name)
            if block is None:
                found[:, j] = [known.get(values.get(name, first), 0) for values in many]
                continue
            fallback = self.variables[block][0]
            own = (values.get(name, first) for values in many)
            found[:, j] = [
                known.get(values.get(block, fallback) if value == INHERIT else value, 0)
                for value, values in zip(own, many, strict=True)
            ]
        return found + self.starts[:-1]

    def best(self, scores: Array) -> dict[str, Choice]:
        """For each variable the choice whose column has the lowest of `scores`, `[columns]`."""
        padded = np.full(self._places.shape, np.inf)
        padded[self._places] = scores
        chosen = np.argmin(padded, axis=1).tolist()
        found: dict[str, Choice] = {}
        for (name, choices), i in zip(self._choices.items(), chosen, strict=True):
            found[name] = choices[i] if choices[i] in self.variables[name] else INHERIT
        return found

    def summed(self, effects: Mapping[str, Mapping[str, tuple[float, float]]]) -> Array:
        """For each one-hot column what its choice alone does to accuracy and to latency, `[columns, 2]`."""
        found = np.zeros((self.size, 2))
        for j, (name, known) in enumerate(self._columns.items()):
            own = {**effects.get(self._of_block.get(name, ""), {}), **effects.get(name, {})}
            for choice, i in known.items():
                found[self.starts[j] + i] = own.get(str(choice), (0.0, 0.0))
        return found


class Additive:
    """Ridge regression on single choices and sums of effects, brought up to date with each trial.

    Attributes:
        coefficients: `[columns + dense, objectives]`.
        effects: `[columns, 2]`: loss of each choice, all of them together being 1, and change of latency.
    """

    def __init__(self, encoding: Encoding, effects: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
        self.effects = encoding.summed(effects)
        self.effects[:, 0] /= max(float(self.effects[:, 0].sum()), 1e-12)
        self._columns = encoding.size
        size = encoding.size + len(self.dense(np.zeros((1, 0), np.intp))[0])
        self._gram = np.zeros((size, size))
        self._slope: Array | None = None
        self._penalty = np.full(size, PRIOR_RIDGE)
        self._penalty[: encoding.size], self._penalty[-1] = RIDGE, 1e-6
        self.coefficients: Array = np.zeros((size, 0))

    def dense(self, rows: Rows) -> Array:
        """The features that are not one-hot: how accuracy and latency follow sums of effects, and the constant."""
        loss, cost = self.effects[rows].sum(1).T
        bent = [np.log1p(loss / scale) for scale in SCALES]
        left = np.log(np.maximum(1 + cost, LEAST_SHARE))
        return np.column_stack([loss, *bent, left, np.ones(len(rows))])

    def learn(self, rows: Rows, losses: Array) -> None:
        """Take up trials, `[trials, variables]` and `[trials, objectives]`."""
        if self._slope is None:
            self._slope = np.zeros((len(self._gram), losses.shape[1]))
        features = self._features(rows)
        self._gram += features.T @ features
        self._slope += features.T @ losses
        self.coefficients = np.linalg.solve(self._gram + np.diag(self._penalty), self._slope).astype(np.float64)

    def predict(self, rows: Rows) -> Array:
        """`[rows, objectives]`."""
        own = self.coefficients[: self._columns][rows].sum(1)
        found: Array = own + self.dense(rows) @ self.coefficients[self._columns :]
        return found

    def single(self, weights: Array, around: Rows) -> Array:
        """What each choice adds to the weighted objectives, near the candidates `around`, `[columns]`."""
        slopes = self.coefficients[self._columns :] @ weights
        loss, cost = self.effects[around].sum(1).mean(0)
        of_loss = slopes[0] + sum(s / (scale + loss) for s, scale in zip(slopes[1:], SCALES, strict=False))
        of_cost = slopes[1 + len(SCALES)] / max(1 + cost, LEAST_SHARE)
        found: Array = self.coefficients[: self._columns] @ weights + self.effects @ np.array([of_loss, of_cost])
        return found

    def _features(self, rows: Rows) -> Array:
        found = np.zeros((len(rows), len(self._gram)))
        found[np.arange(len(rows))[:, None], rows] = 1.0
        found[:, self._columns :] = self.dense(rows)
        return found


class Process:
    """A Gaussian process over residuals of the trials nearest to the front, by how many variables differ."""

    def __init__(self, rows: Rows, residuals: Array) -> None:
        """`rows` `[trials, variables]`, `residuals` `[trials, objectives]`."""
        self._rows = rows
        apart = _apart(rows, rows)
        spectra = {length: np.linalg.eigh(np.exp(-apart / length)) for length in LENGTHS}
        self._fits = [_likeliest(spectra, residual) for residual in residuals.T]

    def predict(self, rows: Rows) -> Believed:
        """Means and deviations of the residuals of other candidates."""
        apart = _apart(rows, self._rows)
        means, deviations = [], []
        for length, variance, noise, inverse, weighted in self._fits:
            near = np.exp(-apart / length)
            means.append(near @ weighted)
            left = 1 - ((near @ inverse) * near).sum(1)
            deviations.append(np.sqrt(variance * np.maximum(left, noise)))
        return Believed(mean=np.column_stack(means), deviation=np.column_stack(deviations))


def _likeliest(
    spectra: Mapping[float, tuple[Array, Array]], residual: Array
) -> tuple[float, float, float, Array, Array]:
    """Length, variance, noise, inverse of the kernel and weights, of the length and noise that explain most."""
    best: tuple[float, float, float, float] | None = None
    for length, (values, vectors) in spectra.items():
        turned = vectors.T @ residual
        for noise in NOISES:
            spectrum = np.maximum(values, 0.0) + noise
            variance = max(float((turned**2 / spectrum).mean()), 1e-12)
            likelihood = -0.5 * float(len(residual) * np.log(variance) + np.log(spectrum).sum())
            if best is None or likelihood > best[0]:
                best = (likelihood, length, variance, noise)
    assert best is not None
    _, length, variance, noise = best
    values, vectors = spectra[length]
    inverse = (vectors / (np.maximum(values, 0.0) + noise)) @ vectors.T
    return length, variance, noise, inverse, inverse @ residual


def nearest(losses: Array, count: int) -> NDArray[np.intp]:
    """The `count` rows of `[trials, objectives]` that need the least improvement to be on the front."""
    if len(losses) <= count:
        return np.arange(len(losses))
    span = np.ptp(losses, axis=0)
    scaled = losses / np.where(span > 0, span, 1.0)
    front = scaled[nondominated(scaled)]
    front = front[np.linspace(0, len(front) - 1, min(len(front), WIDEST_FRONT)).astype(int)]
    missing = (scaled[:, None] - front[None]).min(2).max(1)
    return np.argsort(missing, kind="stable")[:count]


def expected_gain(believed: Believed, front: Array, reference: Array) -> Array:
    """Expected hypervolume improvement of each candidate over `front` up to `reference`, `[candidates]`.

    Exact for independent normal objectives: the region that the front does not dominate is cut into boxes, and over
    each the expectation is a product (Emmerich et al., 2006; Yang et al., 2019).

    Args:
        front: `[points, objectives]`, of which dominated ones and those beyond `reference` do not matter.
    """
    inside = front[(front < reference).all(1)].reshape(-1, len(reference))
    inside = inside[nondominated(inside)]
    if inside.shape[1] > 3 and len(inside) > WIDEST_FRONT:
        order = np.argsort(inside[:, 0], kind="stable")
        inside = inside[order[np.linspace(0, len(order) - 1, WIDEST_FRONT).astype(int)]]
    low, high = _boxes(inside, reference)
    gain = np.ones((len(believed.mean), len(low)))
    for k in range(len(reference)):
        mean, deviation = believed.mean[:, k], believed.deviation[:, k]
        gain *= _below(high[:, k], mean, deviation) - _below(low[:, k], mean, deviation)
    total: Array = gain.sum(1)
    return np.maximum(total, 0.0)


def _boxes(front: Array, reference: Array) -> tuple[Array, Array]:
    """Lower and upper corners of boxes that fill what `front` does not dominate, below `reference`.

    No point of `front` dominates another one, and there are two objectives at least.
    """
    if front.shape[1] == 2:
        x, y = front[np.argsort(front[:, 0])].T
        low = np.column_stack([np.concatenate([[-np.inf], x]), np.full(len(x) + 1, -np.inf)])
        return low, np.column_stack([np.append(x, reference[0]), np.concatenate([reference[1:], y])])
    edges = np.concatenate([[-np.inf], np.unique(front[:, -1]), reference[-1:]])
    lows, highs = [], []
    for bottom, top in itertools.pairwise(edges):
        below = front[front[:, -1] <= bottom][:, :-1]
        below = below[nondominated(below)]
        low, high = _boxes(below, reference[:-1])
        lows.append(np.column_stack([low, np.full(len(low), bottom)]))
        highs.append(np.column_stack([high, np.full(len(high), top)]))
    return np.vstack(lows), np.vstack(highs)


def _below(edge: Array, mean: Array, deviation: Array) -> Array:
    """E[max(0, edge − x)] for normal x, `[candidates, edges]`; 0 at −∞."""
    finite = np.where(np.isfinite(edge), edge, 0.0)
    gap = finite[None] - mean[:, None]
    spread = np.maximum(deviation, 1e-12)[:, None]
    z = gap / spread
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    found: Any = gap * _normal(z) + spread * density
    return np.where(np.isfinite(edge)[None], np.maximum(found, 0.0), 0.0)


def _normal(z: Array) -> Array:
    """The normal distribution function, to 1.2e-7 (Numerical Recipes' erfc)."""
    x = np.abs(z) / np.sqrt(2)
    t = 1 / (1 + 0.5 * x)
    terms = (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
             -0.82215223, 0.17087277)  # fmt: skip
    total = np.zeros_like(t)
    for term in reversed(terms):
        total = total * t + term
    tail = 0.5 * t * np.exp(-x * x + total)
    found: Array = np.where(z > 0, 1 - tail, tail)
    return found


def _apart(one: Rows, other: Rows) -> Array:
    """How many variables differ, `[one, other]`."""
    size = 1 + max(int(one.max(initial=0)), int(other.max(initial=0)))
    alike = _one_hot(one, size) @ _one_hot(other, size).T
    found: Array = one.shape[1] - alike.astype(np.float64)
    return found


def _one_hot(rows: Rows, size: int) -> NDArray[np.float32]:
    found = np.zeros((len(rows), size), np.float32)
    found[np.arange(len(rows))[:, None], rows] = 1.0
    return found

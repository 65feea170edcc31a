"""What trials teach of the others: a sum of single choices, and a Gaussian process over what that leaves.

All is minimised here. The sum is a ridge regression whose normal equations grow with each trial. The trials nearest to
the front are taken out of them and become the points of a process, whose prior mean and covariance are what the others
say of the sum, plus a kernel of how many choices differ. So the doubt about the sum is a part of the doubt about a
candidate, and what far trials say yields to what near ones say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autocompress.optimize.encoding import Array, Encoding, Rows, is_number
from autocompress.optimize.improvement import Believed

Effects = Mapping[str, Mapping[str, tuple[float, float]]]
SCALES = (0.003, 0.03)  # of the sum of all losses, around which accuracy may give way
LEAST_SHARE = 0.05  # of the latency is left at least, whatever the sum of effects says
FAR = 0.1  # weight of a trial that is not among the nearest
CONSTANT = 30.0  # prior deviation of the constant; that of a single choice is 1
TRUST = 2.0  # prior deviation of what effects explain, over that of what all single choices do
# For the kernel, in shares of the number of variables: variance and noise over that of a single choice, and length.
VARIANCES = (0.001, 0.01, 0.03, 0.1, 0.3)
NOISES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LENGTHS = (0.03, 0.1, 0.3, 1.0)
QUICK = 80  # up to so many trials, a fit is so quick that it may look at SEARCHES settings
SEARCHES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Places in VARIANCES, NOISES and LENGTHS."""

    variance: int = 2
    noise: int = 2
    length: int = 1


class Surrogate:
    """Learns losses, `[trials, objectives]`, of columns, `[trials, own]`.

    Attributes:
        rows, losses: what was learned.
        effects: `[columns, 3]`: loss of each choice, all of them together being 1; of precisions the change of the
            share of latency, which adds up; of cuts the logarithm of what is left, since what is gone is not cut again.
    """

    def __init__(self, encoding: Encoding, effects: Effects, objectives: int) -> None:
        self.rows: Rows = np.empty((0, len(encoding.known)), np.intp)
        self.losses: Array = np.empty((0, objectives))
        self.effects = encoding.summed(effects, LEAST_SHARE)
        self.effects[:, 0] /= max(float(self.effects[:, 0].sum()), 1e-12)
        self._told = bool(self.effects.any())
        self._places = encoding.places()
        self._coding, self._axes, self._stretch = self._coded(encoding)
        self._ones = len(self._axes)
        self._shared = encoding.shared()
        self._encoding = encoding
        self._unit = self._units(encoding)
        size = self._ones + len(self._unit) + 1
        self._gram = np.zeros((size, size))
        self._slope = np.zeros((size, objectives))
        self._kernels = [Kernel() for _ in range(objectives)]
        self._turn = 0

    def _units(self, encoding: Encoding) -> Array:
        """What makes each sum vary as much as TRUST says, over candidates drawn at random."""
        rng = np.random.default_rng(0)
        drawn = encoding.columns(rng.integers(0, encoding.sizes, (256, len(encoding.sizes))))
        spread = self._sums(drawn).std(0)
        units: Array = TRUST * np.sqrt(len(encoding.known)) / np.where(spread > 1e-9, spread, np.inf)
        return units

    def _sums(self, rows: Rows) -> Array:
        """How often each choice of each kind is there, borders, and how losses may follow sums of effects."""
        counts = np.column_stack([self._shared[rows].sum(1), self._encoding.borders(rows)])
        if not self._told:
            return counts
        loss, integer, cut = self.effects[rows].sum(1).T
        bent = [np.log1p(np.maximum(loss, 0.0) / scale) for scale in SCALES]
        return np.column_stack([counts, loss, *bent, np.log(np.maximum(1 + integer, LEAST_SHARE)), cut])

    def features(self, rows: Rows, placed: Array | None = None) -> Array:
        """`[rows, features]`: which choices, sums over all variables, the constant. `placed` is where rows are."""
        found = np.zeros((len(rows), len(self._gram)))
        places = self.placed(rows) if placed is None else placed
        found[:, : self._ones] = places[:, self._axes] * self._stretch
        found[:, self._ones : -1] = self._sums(rows) * self._unit
        found[:, -1] = CONSTANT
        return found

    def placed(self, rows: Rows) -> Array:
        """Where candidates are: squared distances count the variables that differ, of numbers by how far."""
        return self._places[rows].reshape(len(rows), -1)

    def _coded(self, encoding: Encoding) -> tuple[Array, Rows, Array]:
        """What each column is in the regression, `[columns, features]`; which axes of places that is, times what.

        First choices are what others are compared with. A number is all the steps that lead to it, so that what one of
        them does is learned from whoever takes it.
        """
        own = np.repeat(np.arange(len(encoding.known)), np.diff(encoding.starts))
        placed = np.zeros((len(own), len(encoding.known), self._places.shape[1]))
        placed[np.arange(len(own)), own] = self._places
        whole = placed.reshape(len(own), -1)
        axes = np.flatnonzero(whole.any(0) & ~whole[encoding.starts[:-1]].any(0))
        names = np.array([not is_number(choices) for choices in encoding.known.values()])
        stretch = np.where(names[axes // self._places.shape[1]], 2**0.5, 1.0)
        return whole[:, axes] * stretch, axes, stretch

    def learn(self, rows: Rows, losses: Array) -> None:
        """Take up trials, each once."""
        features = self.features(rows)
        self._gram += features.T @ features
        self._slope += features.T @ losses
        self.rows = np.vstack([self.rows, rows])
        self.losses = np.vstack([self.losses, losses])

    def fit(self, near: Rows) -> "Fit":
        """What is believed now, with the trials `near`, by number, as points of the process."""
        features, losses = self.features(self.rows[near]), self.losses[near]
        centre = losses.mean(0)
        one = self._gram[:, -1:] / CONSTANT  # sum of all features
        gram = FAR * (self._gram - features.T @ features)
        gram.flat[:: len(gram) + 1] += 1.0
        spread = np.linalg.inv(gram).astype(np.float64)
        left = self._slope - one * centre - features.T @ (losses - centre)
        mean = FAR * (spread @ left)
        rest = losses - centre - features @ mean
        linear = (features @ spread) @ features.T
        places = self.placed(self.rows[near])
        apart = _apart(places, places)
        scale = len(self.rows[0])
        posteriors = [self._settle(k, linear, apart, rest[:, k], scale) for k in range(losses.shape[1])]
        self._turn += 1
        return Fit(self, near, features, spread, centre, mean, posteriors)

    def _settle(self, k: int, linear: Array, apart: Array, rest: Array, scale: int) -> "Posterior":
        """The likelier of the kernel in use and of others a step away; of few trials many, of many one objective's."""
        best = Posterior.of(self._kernels[k], linear, apart, rest, scale)
        objectives = len(self._kernels)
        if len(rest) <= QUICK:
            turns = range(self._turn * SEARCHES, (self._turn + 1) * SEARCHES)
        else:
            turns = range(self._turn // objectives, self._turn // objectives + (self._turn % objectives == k))
        for turn in turns:
            other = _step(self._kernels[k], turn)
            found = Posterior.of(other, linear, apart, rest, scale) if other != self._kernels[k] else best
            if found.likelihood > best.likelihood:
                best, self._kernels[k] = found, other
        return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """One objective's process, given its points."""

    kernel: Kernel
    scale: int
    likelihood: float
    amplitude: float
    inverse: Array
    weights: Array

    @classmethod
    def of(cls, kernel: Kernel, linear: Array, apart: Array, rest: Array, scale: int) -> "Posterior":
        """Its amplitude is the likeliest one."""
        count = len(rest)
        variance, noise, length = _numbers(kernel, scale)
        whole = linear + variance * np.exp(-apart / length)
        whole.flat[:: count + 1] += noise
        inverse: Array = np.linalg.inv(whole).astype(np.float64)
        weights = inverse @ rest
        amplitude = max(float(rest @ weights) / count, 1e-16)
        half = float(np.log(np.diagonal(np.linalg.cholesky(whole))).sum())
        likelihood = -0.5 * count * float(np.log(amplitude)) - half
        return cls(
            kernel=kernel, scale=scale, likelihood=likelihood, amplitude=amplitude, inverse=inverse, weights=weights
        )


class Fit:
    """What is believed of candidates. `size` is the number of features."""

    def __init__(
        self, of: Surrogate, near: Rows, features: Array, spread: Array, centre: Array, mean: Array,
        posteriors: list[Posterior],
    ) -> None:  # fmt: skip
        self._of = of
        self._placed = of.placed(of.rows[near])
        self._centre = centre
        self._mean = mean
        self._posteriors = posteriors
        self._spread = spread
        self._across = spread @ features.T
        self.size = len(spread)

    def predict(self, rows: Rows) -> Believed:
        """Means and deviations of the losses of `rows`, `[rows, objectives]`, without the noise of measuring them."""
        placed = self._of.placed(rows)
        features = self._of.features(rows, placed)
        linear = features @ self._across
        own = np.einsum("ij,ij->i", features @ self._spread, features)
        apart = _apart(placed, self._placed)
        means = features @ self._mean + self._centre
        deviations = np.empty_like(means)
        for k, posterior in enumerate(self._posteriors):
            variance, _, length = _numbers(posterior.kernel, posterior.scale)
            near = linear + variance * np.exp(-apart / length)
            means[:, k] += near @ posterior.weights
            left = own + variance - np.einsum("ij,ij->i", near @ posterior.inverse, near)
            deviations[:, k] = np.sqrt(posterior.amplitude * np.maximum(left, 0.0))
        return Believed(mean=means, deviation=deviations)

    def single(self, weights: Array, around: Rows, draws: Array | None = None) -> Array:
        """What each choice adds to the weighted objectives near each of `around`, `[around, columns]`.

        Args:
            weights: `[around, objectives]`.
            draws: standard normal, `[around, features]`: each time other coefficients, as likely as is believed.
        """
        told = self._of
        believed = self._mean + self._across @ np.column_stack([p.weights for p in self._posteriors])
        slopes = weights @ believed.T
        if draws is not None:
            amplitude = np.sqrt([p.amplitude for p in self._posteriors])
            doubt = np.sqrt(np.maximum(np.diagonal(self._spread), 0.0))
            slopes = slopes + draws * doubt * (weights @ amplitude)[:, None]
        found = slopes[:, : told._ones] @ told._coding.T
        sums = slopes[:, told._ones : -1] * told._unit
        kinds = told._shared.shape[1]
        found = found + sums[:, :kinds] @ told._shared.T + sums[:, kinds, None] * told._encoding.bordering(around)
        if told._told:
            loss, integer, _ = told.effects[around].sum(1).T
            of_loss = sums[:, kinds + 1] + sum(
                sums[:, kinds + 2 + i] / (s + np.maximum(loss, 0.0)) for i, s in enumerate(SCALES)
            )
            of_integer = sums[:, -2] / np.maximum(1 + integer, LEAST_SHARE)
            found = found + np.column_stack([of_loss, of_integer, sums[:, -1]]) @ told.effects.T
        return found


def _numbers(kernel: Kernel, scale: int) -> tuple[float, float, float]:
    """Variance, noise and length."""
    return scale * VARIANCES[kernel.variance], scale * NOISES[kernel.noise], max(1.0, scale * LENGTHS[kernel.length])


def _step(kernel: Kernel, turn: int) -> Kernel:
    """The kernel a step away, in the direction whose turn it is; itself where there is no such step."""
    name, grid = (("variance", VARIANCES), ("noise", NOISES), ("length", LENGTHS))[turn % 3]
    place = getattr(kernel, name) + (1 if turn // 3 % 2 else -1)
    changes: dict[str, Any] = {name: place}
    return replace(kernel, **changes) if 0 <= place < len(grid) else kernel


def _apart(one: Array, other: Array) -> Array:
    """Squared distances, `[one, other]`."""
    squares = np.einsum("ij,ij->i", one, one)[:, None] + np.einsum("ij,ij->i", other, other)
    found: Array = np.maximum(squares - 2 * (one @ other.T), 0.0)
    return found

"""Fronts: keeping one, how near to it others are, and what a candidate is expected to add to it. All is minimised."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

# With d objectives a front of n points is cut into about n^(d-1) boxes; so many points keep them below 2,000.
WIDEST = {2: 300, 3: 56, 4: 14}
WIDEST_OF_MORE = 8
WIDEST_NEAR = 48  # points of a front that nearness is counted from
REACH = 8.0  # standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Believed:
    """Means and standard deviations of objectives, `[candidates, objectives]`."""

    mean: Array
    deviation: Array


class Members:
    """Which rows of a growing list no other row dominates; of equal rows the first."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._losses: Array = np.empty((0, 0))

    def add(self, number: int, losses: Array) -> None:
        """Take up a row, `[objectives]`."""
        if not self.numbers:
            self._losses = np.empty((0, len(losses)))
        if (self._losses <= losses).all(1).any():
            return
        kept = np.asarray(~(self._losses >= losses).all(1))
        self.numbers = [*itertools.compress(self.numbers, kept), number]
        self._losses = np.vstack([self._losses[kept], losses])


def nearest(losses: Array, front: Array, count: int) -> Rows:
    """The `count` rows of `[trials, objectives]` that need the least improvement to be on the front, nearest first."""
    span = np.ptp(losses, axis=0)
    unit = np.where(span > 0, span, 1.0)
    missing, columns = np.full(len(losses), np.inf), (losses / unit).T.copy()  # a maximum of few is slow by rows
    for point in thinned(front / unit, WIDEST_NEAR):
        missing = np.minimum(missing, (columns - point[:, None]).max(0))
    return np.argsort(missing, kind="stable")[:count]


def thinned(front: Array, count: int) -> Array:
    """At most `count` of the points, far from each other."""
    if len(front) <= count:
        return front
    scaled = front / np.maximum(np.ptp(front, axis=0), 1e-12)
    chosen = [int(scaled[:, 0].argmin())]
    apart = np.full(len(front), np.inf)
    while len(chosen) < count:
        away = scaled - scaled[chosen[-1]]
        apart = np.minimum(apart, np.einsum("ij,ij->i", away, away))
        chosen.append(int(apart.argmax()))
    return front[chosen]


class Region:
    """What a front leaves to be gained, up to `reference`, as boxes.

    A front of more points than WIDEST is thinned.

    Args:
        front: `[points, objectives]`; dominated ones and those beyond `reference` do not matter.
    """

    def __init__(self, front: Array, reference: Array) -> None:
        size = len(reference)
        inside = front[(front < reference).all(1)].reshape(-1, size)
        low, high = _boxes(thinned(inside, WIDEST.get(size, WIDEST_OF_MORE)), reference)
        self._axes: list[tuple[Array, Rows, Rows]] = []
        for k in range(size):
            edges, where = np.unique(np.concatenate([low[:, k], high[:, k]]), return_inverse=True)
            self._axes.append((edges, where[: len(low)], where[len(low) :]))

    def expected_gain(self, believed: Believed) -> Array:
        """Expected hypervolume improvement of each candidate, `[candidates]`.

        Exact for independent normal objectives: over each box the expectation is a product (Emmerich et al., 2006;
        Yang et al., 2019).
        """
        gain: Any = 1.0
        for k, (edges, low, high) in enumerate(self._axes):
            below = _below(edges, believed.mean[:, k], believed.deviation[:, k])
            gain = gain * (below[:, high] - below[:, low])
        total: Array = gain.sum(1)
        return total


def _boxes(front: Array, reference: Array) -> tuple[Array, Array]:
    """Lower and upper corners of boxes that fill what `front` does not dominate, below `reference`."""
    order = np.argsort(front[:, -1], kind="stable")
    sliced, rest = front[order], reference[:-1]
    edges = np.concatenate([[-np.inf], sliced[:, -1], reference[-1:]])
    if len(rest) == 1:
        tops = np.minimum.accumulate(np.concatenate([rest, sliced[:, 0]]))
        low = np.column_stack([np.full(len(tops), -np.inf), edges[:-1]])
        return low, np.column_stack([tops, edges[1:]])
    lows, highs = [], []
    for i, (bottom, top) in enumerate(itertools.pairwise(edges)):
        if top > bottom:
            low, high = _boxes(sliced[:i, :-1], rest)
            lows.append(np.column_stack([low, np.full(len(low), bottom)]))
            highs.append(np.column_stack([high, np.full(len(high), top)]))
    return np.vstack(lows), np.vstack(highs)


def _below(edges: Array, mean: Array, deviation: Array) -> Array:
    """E[max(0, edge − x)] for normal x, `[candidates, edges]`, never falling from edge to edge; 0 at −∞."""
    finite = np.isfinite(edges)
    gap = np.where(finite, edges, 0.0)[None] - mean[:, None]
    spread = np.maximum(deviation, 1e-300)[:, None]
    with np.errstate(over="ignore"):
        z = gap / spread
    inner = spread * np.interp(z, _GRID, _PART)
    found: Array = np.where(finite[None], np.where(z > REACH, gap, np.where(z < -REACH, 0.0, inner)), 0.0)
    return found


def _partial(z: float) -> float:
    """E[max(0, z − x)] for standard normal x."""
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return max(0.0, z * 0.5 * math.erfc(-z / math.sqrt(2)) + density)


# Interpolated from a table that is convex and rises: numpy has no error function, and a formula's own error would make
# differences of far edges negative.
_GRID = np.linspace(-REACH, REACH, 4097)
_PART = np.array([_partial(float(z)) for z in _GRID])

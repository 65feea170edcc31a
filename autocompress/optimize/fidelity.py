"""The fidelity ladder: who is worth a longer recovery, told by the ones that had it.

A candidate's accuracy on one rung says something of its accuracy on the next one. How much is learned from those that
were promoted: the share of what was lost that a longer recovery leaves, and how far that share scatters. Who is
promoted is decided by the optimistic end of that band, since a trial that was never made teaches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.core.front import hypervolume, nondominated

# Before a pair is known: half of what was lost comes back, give or take a quarter. Each counts as one pair.
LEFT, SCATTER = 0.5, 0.25
NEAR = 0.7  # pairs count by how near the loss of their lower rung is, in natural logarithms
LEAST_LOSS = 0.002  # two losses below this are the same: intervals of an accuracy are wider
LEAST_PAIRS = 6  # of which a rank correlation means something
TRUSTED = 0.5  # a rung whose ranks correlate less with the next one's decides nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A point of a rung: accuracy, and costs, which are the same on all rungs and less is better."""

    accuracy: float
    costs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What the next rung is expected to give, for each candidate: `[candidates]`."""

    expected: Floats
    spread: Floats

    def hoped(self, spreads: float) -> Floats:
        """So many spreads above what is expected."""
        return self.expected + spreads * self.spread


def band(accuracies: Sequence[float], pairs: Sequence[tuple[float, float]], original: float) -> Band:
    """Accuracies on the next rung, given those on this one.

    Of a loss a share is left, which is learned from losses of about that size. What lost next to nothing, or lies above
    the original, has nothing to come back: half of what it is above may be luck of these items, and what a recovery
    adds or takes there is learned from others like it.

    Args:
        accuracies: on the lower rung.
        pairs: accuracy on the lower and on the next rung of those that have both.
        original: accuracy of the model that recovery leads back to.
    """
    lost = original - np.asarray(accuracies, np.float64)
    if len(pairs) >= LEAST_PAIRS and not trusted(rank_correlation(pairs)):
        upper = np.array([high for _, high in pairs])
        return Band(expected=np.full(len(lost), np.median(upper)), spread=np.full(len(lost), np.std(upper)))
    low = original - np.array([a for a, _ in pairs], np.float64)
    high = original - np.array([b for _, b in pairs], np.float64)
    left, scatter = _left(lost, low[low > -LEAST_LOSS], high[low > -LEAST_LOSS])
    even, evens = lost <= LEAST_LOSS, low <= LEAST_LOSS
    left[even], scatter[even] = _kept(lost[even], low[evens], high[evens])
    return Band(expected=original - left, spread=scatter)


def _left(lost: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """What is left of each loss, and how far that scatters, by the losses of others before and after."""
    size, known = np.maximum(lost, LEAST_LOSS), np.maximum(low, LEAST_LOSS)
    near = np.exp(-((np.log(size)[:, None] - np.log(known)[None]) ** 2) / (2 * NEAR**2))
    share = (LEFT + (near * (high / known)).sum(1)) / (1 + near.sum(1))
    off = (high / known)[None] - share[:, None]
    scatter = np.sqrt((SCATTER**2 + (near * off**2).sum(1)) / (1 + near.sum(1)))
    return share * size, scatter * size


def _kept(lost: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The same of what lost next to nothing, by what others like it gained."""
    gained, count = low - high, 1 + len(low)
    gain = (LEFT * lost + gained.sum()) / count
    off = gained[None] - gain[:, None]
    size = np.maximum(np.abs(lost), LEAST_LOSS)
    return lost - gain, np.sqrt((SCATTER**2 * size**2 + (off**2).sum(1)) / count)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, ties at their mean rank; None of fewer than three pairs, or where one side is constant."""
    if len(pairs) < 3:
        return None
    one, other = (_ranks(side) for side in np.array(pairs, np.float64).T)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def trusted(correlation: float | None) -> bool:
    """Whether a rung may decide by its accuracies; one of which nothing is known may."""
    return correlation is None or correlation >= TRUSTED


def contributions(
    candidates: Sequence[Rated],
    front: Sequence[Rated],
    worst: Rated,
) -> Floats:
    """What each candidate would add to the hypervolume of `front` up to `worst`, `[candidates]`."""
    reference = _losses([worst])[0]
    held = _losses(front).reshape(-1, len(reference))
    held = held[nondominated(held)]
    before = hypervolume(held, reference)
    return np.array([hypervolume(np.vstack([held, point]), reference) - before for point in _losses(candidates)])


def _losses(points: Sequence[Rated]) -> Floats:
    return np.array([(-point.accuracy, *point.costs) for point in points], np.float64)


def _ranks(values: Floats) -> Floats:
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    for value in np.unique(values):
        same = values == value
        ranks[same] = ranks[same].mean()
    return ranks

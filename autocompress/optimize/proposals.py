"""Candidates near what is known: mutations and crossings, as numbers of choices, `[candidates, variables]`."""

import numpy as np
from numpy.typing import NDArray

from autocompress.optimize.encoding import Rows

MOST_CHANGED = 4  # variables that a mutation changes
NEIGHBOUR = 0.7  # of the changes of a number are to the next one


def mutations(parents: Rows, sizes: Rows, ordered: NDArray[np.bool_], count: int, rng: np.random.Generator) -> Rows:
    """Parents in turn, one to MOST_CHANGED variables of each changed, fewer more often; numbers mostly to the next."""
    found = parents[np.arange(count) % len(parents)]
    width = found.shape[1]
    changed = np.minimum(rng.geometric(0.5, count), min(MOST_CHANGED, width))
    order = rng.random(found.shape).argsort(1)[:, :MOST_CHANGED]
    row, rank = np.nonzero(np.arange(order.shape[1]) < changed[:, None])
    variable = order[row, rank]
    now, many = found[row, variable], sizes[variable]
    other = (now + 1 + (rng.random(len(row)) * (many - 1)).astype(np.intp)) % many
    step = np.where(rng.random(len(row)) < 0.5, 1, -1)
    beside = np.where((now + step < 0) | (now + step >= many), now - step, now + step)
    near = ordered[variable] & (rng.random(len(row)) < NEIGHBOUR)
    found[row, variable] = np.where(near, np.clip(beside, 0, many - 1), other)
    return found


def crossings(parents: Rows, count: int, rng: np.random.Generator) -> Rows:
    """Each variable from one of two parents, a stretch or here and there; parents that are neighbours more often.

    Parents are in order of an objective; there are at least two.
    """
    total, width = parents.shape
    first = np.arange(count) % total
    near = first + rng.choice([-2, -1, 1, 2], count)
    near = np.where((near < 0) | (near >= total) | (near == first), (first + 1) % total, near)
    any_other = (first + 1 + (rng.random(count) * (total - 1)).astype(np.intp)) % total
    second = np.where(rng.random(count) < 0.7, near, any_other)
    scattered = rng.random((count, width)) < rng.random((count, 1))
    ends = np.sort(rng.integers(0, width + 1, (count, 2)), axis=1)
    place = np.arange(width)
    stretch = (place >= ends[:, :1]) & (place < ends[:, 1:])
    mask = np.where(rng.random((count, 1)) < 0.5, stretch, scattered)
    found: Rows = np.where(mask, parents[second], parents[first])
    return found


def mixed(base: Rows, other: Rows, rng: np.random.Generator) -> Rows:
    """Each of `base` with a random share of its variables from its partner in `other`; every second is the partner."""
    share = np.where(np.arange(len(base)) % 2 == 0, 1.0, rng.random(len(base)))
    found: Rows = np.where(rng.random(base.shape) < share[:, None], other, base)
    return found

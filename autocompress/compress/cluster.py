"""Weights that share a few values: a codebook for a layer.

The values are found by k-means (Han et al., Deep Compression, 2016), or are powers of two (Zhou et al., INQ, 2017) or
sums of two of them (Li et al., Additive Powers-of-Two Quantization, 2020) times one factor for the layer. Zeros stay
zeros.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from autocompress.core.candidate import Levels

ROUNDS = 30  # of Lloyd's algorithm
_FACTORS = np.linspace(1.0, 0.3, 36)  # of the largest magnitude, tried for patterns of powers


def codebook(weight: NDArray[np.float32], bits: int, levels: Levels) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The values that a layer's weights share, at most 2 to `bits` of them, and which one each weight has.

    Returns:
        Indices in the shape of `weight`, and the values, ascending. A layer that already has no more values keeps them.
    """
    values = np.unique(weight)
    if len(values) <= 2**bits:
        table = values.astype(np.float32)
    elif levels == "kmeans":
        table = _means(weight.reshape(-1), 2**bits)
    else:
        table = _pattern(weight.reshape(-1), _powers(bits) if levels == "power" else _sums(bits))
    return nearest(weight, table), table


def nearest(weight: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Which of the ascending values is nearest to each weight."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, weight).astype(np.uint8)


def _means(weight: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Lloyd's algorithm on sorted values, begun evenly between the extremes; zero is one where weights are zero."""
    zero = bool((weight == 0).any())
    ordered = np.sort(weight[weight != 0] if zero else weight).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    # Half evenly between the extremes, which keeps the large weights, half at quantiles: most weights are small.
    count -= zero
    even = np.linspace(ordered[0], ordered[-1], count)
    spread = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    means = np.sort((even + spread) / 2)
    for _ in range(ROUNDS):
        ends = np.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        edges = np.concatenate([[0], ends, [len(ordered)]])
        held = np.diff(edges)
        moved = np.where(held > 0, np.diff(sums[edges]) / np.maximum(held, 1), means)
        if np.allclose(moved, means, rtol=0, atol=1e-9):
            break
        means = np.sort(moved)
    found = np.unique(np.concatenate([means, [0.0]]) if zero else means)
    return found.astype(np.float32)


def _powers(bits: int) -> NDArray[np.float64]:
    """One, a half, a quarter, …: as many as there are codes for a sign and a magnitude, zero left out."""
    return 2.0 ** -np.arange(2 ** (bits - 1) - 1)


def _sums(bits: int) -> NDArray[np.float64]:
    """Sums of one of 1, 1/4, 1/16, … or zero and one of 1/2, 1/8, … or zero, for the codes without the sign."""
    first = (bits - 1 + 1) // 2
    one = [0.0, *(4.0 ** -np.arange(2**first - 1))]
    other = [0.0, *(0.5 * 4.0 ** -np.arange(2 ** (bits - 1 - first) - 1))]
    sums = np.unique([a + b for a, b in itertools.product(one, other)])
    largest: NDArray[np.float64] = sums[sums > 0] / sums.max()
    return largest


def _pattern(weight: NDArray[np.float32], magnitudes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Zero and both signs of the magnitudes, times the factor with the least squared error."""
    unit = np.unique(np.concatenate([-magnitudes, [0.0], magnitudes]))
    best, least = unit, np.inf
    sample = weight[:: max(1, len(weight) // 2**16)]
    for factor in _FACTORS * float(np.abs(weight).max()):
        table = unit * factor
        error = float(((table[nearest(sample, table)] - sample) ** 2).mean())
        if error < least:
            best, least = table, error
    return best.astype(np.float32)

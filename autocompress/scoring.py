"""Accuracy of a file from the outputs its runtime gave, and how sure that is."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.measurement import Interval

Metric = Callable[[Any, Any], float]
ByItem = Callable[[Any, Any], NDArray[Any]]
RESAMPLES = 500
FEWEST_RESAMPLES = 100
BUDGET_S = 1.0


def read_outputs(folder: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """What the worker wrote: one .npy for each output, in the order of `names`."""
    found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise StageError("score", f"output {name!r} holds NaN or infinite values")
    return found


class PairedBootstrap:
    """95 % interval of a metric, from its difference to a reference on the same resampled items (Efron, 1979).

    What the two have in common, hard items above all, cancels out: the interval is that of the difference, laid
    around the reference's own score.
    """

    def __init__(self, metric: Metric, reference: Any, targets: Any, items: int, by_item: ByItem | None = None) -> None:
        """`by_item` says of each item whether it is a hit, of which the metric is the share; called once a model."""
        self._metric = metric
        self._by_item = by_item
        self._targets = targets
        self._reference = reference
        before = time.monotonic()
        self.reference_score = metric(reference, targets)
        a_call = max(time.monotonic() - before, 1e-6)
        self._count = min(RESAMPLES, int(BUDGET_S / a_call))
        self.reason = (
            None
            if self._count >= FEWEST_RESAMPLES
            else f"the metric takes {a_call:.2g} s a call, an interval needs {FEWEST_RESAMPLES} calls"
        )
        rng = np.random.default_rng(0)
        count = 0 if self.reason else self._count
        self._draws = [rng.integers(0, items, items) for _ in range(count)]
        self._reference_scores: list[float] | None = None

    def interval(self, outputs: Any) -> Interval | None:
        """The interval of these outputs' score; None, with `reason` set, where the metric is too slow for it."""
        if self.reason is not None:
            return None
        if self._by_item is not None:
            gained = self._by_item(outputs, self._targets) - self._by_item(self._reference, self._targets)
            low, high = self._around([float(gained[draw].mean()) for draw in self._draws])
            return max(low, 0.0), min(high, 1.0)
        if self._reference_scores is None:
            self._reference_scores = [
                self._metric(take(self._reference, d), take(self._targets, d)) for d in self._draws
            ]
        scores = [self._metric(take(outputs, d), take(self._targets, d)) for d in self._draws]
        return self._around(np.subtract(scores, self._reference_scores))

    def _around(self, differences: Sequence[float] | NDArray[Any]) -> Interval:
        low, high = np.quantile(differences, [0.025, 0.975])
        return self.reference_score + float(low), self.reference_score + float(high)


def take(tree: Any, items: NDArray[np.int64]) -> Any:
    """The given items of an array, or of each array in a tuple or dict."""
    if isinstance(tree, Mapping):
        return {key: take(value, items) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(take(value, items) for value in tree)
    return tree[items]

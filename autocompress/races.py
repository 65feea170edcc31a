"""Accuracy on a part of validation, where that already says that a file is dominated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.front import Rival
from autocompress.core.measurement import Interval
from autocompress.scoring import take

PART = 512  # items that are scored first
FEWEST = 3 * PART  # items of validation, of fewer of which a part is not worth a second pass
SURE = 3.29  # standard errors: one in a thousand is stopped in error
PER_INTERVAL = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Accuracy as a part of the items tells it: fp32's on all items, and the difference to it on these."""

    accuracy: float
    interval: Interval
    items: int


class Race:
    """Scores a part of validation first, for a metric that is a mean over items.

    Args:
        inputs: folder of all of validation's inputs.
        by_item: for each item a figure whose mean is the metric.
        reference: fp32's outputs on all items.
        targets: of all items.
    """

    def __init__(self, inputs: Path, by_item: Callable[[Any, Any], NDArray[Any]], reference: Any, targets: Any) -> None:
        figures = by_item(reference, targets)
        self._rows = np.unique(np.linspace(0, len(figures) - 1, PART).astype(int))
        self._whole = float(figures.mean())
        self._figures = figures[self._rows]
        self._targets = take(targets, self._rows)
        self._by_item = by_item
        self.inputs = inputs.with_name(f"{inputs.name}-part")
        self.inputs.mkdir(exist_ok=True)
        for file in inputs.glob("*.npy"):
            np.save(self.inputs / file.name, np.load(file, mmap_mode="r", allow_pickle=False)[self._rows])

    def judge(self, outputs: Any, ratio_ci: Interval, rivals: Sequence[Rival]) -> Partial | None:
        """The accuracy, where a rival that is not slower is surely more accurate; None where all items are needed.

        Args:
            outputs: of the part.
            ratio_ci: of the file's latency.
        """
        gained = self._by_item(outputs, self._targets) - self._figures
        count = len(gained)
        # Items that all agree are no proof that the others do: one of them might not.
        error = math.sqrt((float(gained.var()) + 1 / count) / count)
        accuracy = self._whole + float(gained.mean())
        best = max((r.accuracy for r in rivals if r.ratio_ci[1] <= ratio_ci[0]), default=-math.inf)
        if accuracy + SURE * error >= best:
            return None
        half = PER_INTERVAL * error
        return Partial(accuracy=accuracy, interval=(accuracy - half, accuracy + half), items=count)

"""What every cascade of two front members would give, by their outputs on validation and their measured latencies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cascade import Rule, cascade_name
from autocompress.core.confidence import confidence
from autocompress.core.errors import InputError
from autocompress.core.trial import Score, Trial

if TYPE_CHECKING:
    from autocompress.task import CheckedTask

# Thresholds that are tried for a pair and a kind of confidence, evenly over those that part the items.
THRESHOLDS = 200
NOT_YET = dict.fromkeys(
    ("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed"), "not known before it runs"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A front member with its outputs on validation, by name; `hits` of each item where the metric is their mean."""

    trial: Trial
    score: Score
    outputs: Mapping[str, NDArray[Any]]
    hits: NDArray[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A cascade as its members' figures say: `share` of the items goes on to the large model."""

    small: Trial
    large: Trial
    rule: Rule
    share: float
    score: Score

    @property
    def name(self) -> str:
        """The members and the rule in a few words."""
        return cascade_name(self.small, self.large, self.rule)


def options(members: Sequence[Member], task: "CheckedTask") -> Iterator[Option]:
    """Cascades of each pair whose large model is slower and more accurate, at thresholds spread over the items.

    Raises:
        InputError: the task does not classify.
    """
    for small, large in permutations(members, 2):
        if small.score.latency_ms < large.score.latency_ms and small.score.accuracy < large.score.accuracy:
            yield from _at_thresholds(small, large, "margin", task)
            yield from _at_thresholds(small, large, "probability", task)


def mixture(large: NDArray[np.bool_], share: float, most: int) -> list[int]:
    """At most `most` items, mixed evenly, of which the part that `large` marks is as near to `share` as it can be."""
    part = Fraction(share).limit_denominator(most)
    times = most // part.denominator
    counts = (part.numerator * times, (part.denominator - part.numerator) * times)
    placed = [
        ((i + 0.5) / count, int(items[i * len(items) // count]))
        for items, count in zip((np.flatnonzero(large), np.flatnonzero(~large)), counts, strict=True)
        for i in range(count if len(items) else 0)
    ]
    return [row for _, row in sorted(placed)]


def class_scores(outputs: Mapping[str, NDArray[Any]], task: "CheckedTask") -> str:
    """Name of the first output, if it holds a row of class scores an item, and the first target its class.

    Raises:
        InputError: it does not.
    """
    name, scores = next(iter(outputs.items()))
    targets = task.split("validation").targets.flatten(task.targets("validation"))
    labels = next(iter(targets.values()))
    rows = scores.ndim == 2 and scores.shape[1] > 1 and np.issubdtype(scores.dtype, np.floating)
    classes = rows and labels.shape == (len(scores),) and np.issubdtype(labels.dtype, np.integer)
    if not classes or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError(
            f"task {task.task.name!r} does not classify: a cascade needs one row of class scores an item and integer "
            f"labels, got {name!r} of {scores.dtype} {list(scores.shape)} and targets of {labels.dtype} "
            f"{list(labels.shape)}; pick one point instead"
        )
    return name


def _at_thresholds(
    small: Member, large: Member, kind: Literal["margin", "probability"], task: "CheckedTask"
) -> Iterator[Option]:
    output = class_scores(small.outputs, task)
    sure = confidence(small.outputs[output], kind).astype(np.float64)
    order, items = np.argsort(sure, kind="stable"), len(sure)
    ordered = sure[order]
    counts = np.flatnonzero(ordered[:-1] < ordered[1:]) + 1  # equally sure items cannot be told apart
    counts = counts[np.linspace(0, len(counts) - 1, min(len(counts), THRESHOLDS)).astype(int)]
    for count, accuracy in zip(counts.tolist(), _accuracies(small, large, order, counts, task), strict=True):
        yield Option(
            small=small.trial,
            large=large.trial,
            rule=Rule(output=output, kind=kind, threshold=float(ordered[count - 1] + ordered[count]) / 2),
            share=count / items,
            score=_expected(small.score, large.score, count / items, accuracy),
        )


def _accuracies(
    small: Member, large: Member, order: NDArray[Any], counts: NDArray[Any], task: "CheckedTask"
) -> list[float]:
    """The metric where the large model answers the first `count` items of `order`, for each count, ascending."""
    if small.hits is not None and large.hits is not None:
        gained = np.cumsum((large.hits - small.hits)[order])[counts - 1]
        return [float(x) for x in small.hits.mean() + gained / len(order)]
    joined = {name: np.array(array) for name, array in small.outputs.items()}
    found, targets, done = [], task.targets("validation"), 0
    for count in counts.tolist():
        for name, array in joined.items():
            array[order[done:count]] = large.outputs[name][order[done:count]]
        done = count
        found.append(task.metric(task.unflatten(joined), targets))
    return found


def _expected(small: Score, large: Score, share: float, accuracy: float) -> Score:
    """Every item costs the small model's latency, and `share` of them the large one's too."""
    low, high = (s + share * b for s, b in zip(small.latency_ms_ci, large.latency_ms_ci, strict=True))
    ratios = [s + share * b for s, b in zip(small.ratio_ci, large.ratio_ci, strict=True)]
    return Score(
        accuracy=accuracy,
        latency_ms=small.latency_ms + share * large.latency_ms,
        latency_ms_ci=(low, high),
        ratio=small.ratio + share * large.ratio,
        ratio_ci=(ratios[0], ratios[1]),
        size_bytes=small.size_bytes + large.size_bytes,
        reasons=NOT_YET,
    )

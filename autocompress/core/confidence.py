"""How sure a classifier is of its answer, and a pair of which the large one answers only where the small one is unsure.

Packages hold a copy of this file as `predict_cascade.py`: it needs numpy and nothing else.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
# What to ask of a row of class scores, logits or probabilities alike.
KINDS = ("probability", "margin")


def confidence(scores: NDArray[Any], kind: str) -> NDArray[Any]:
    """For each row of `[items, classes]` how sure it is.

    `probability` is the largest one after softmax (Hendrycks and Gimpel, 2017), `margin` the distance of the two
    largest scores (Park et al., Big/Little deep neural network, 2015).
    """
    if kind == "margin":
        top = np.partition(scores, -2, axis=1)
        found = top[:, -1] - top[:, -2]
    else:
        found = 1 / np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1)
    return np.asarray(found)


def cascaded(
    inputs: Arrays,
    small: Callable[[Arrays], Arrays],
    large: Callable[[Arrays], Arrays],
    *,
    output: str,
    kind: str,
    threshold: float,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Outputs for a batch: `small`'s, and `large`'s where the confidence is below `threshold`; and where that was."""
    outputs = dict(small(inputs))
    unsure = confidence(outputs[output], kind) < threshold
    going_on = np.count_nonzero(unsure)
    if going_on == len(unsure):
        return dict(large(inputs)), unsure
    if going_on:
        better = large({name: array[unsure] for name, array in inputs.items()})
        for name, array in outputs.items():
            outputs[name] = array.copy()  # the runtime's own memory stays as it is
            outputs[name][unsure] = better[name]
    return outputs, unsure

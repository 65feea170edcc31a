"""Choices that lie on a line with the original: which of them to probe, and what to expect of those between."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from autocompress.core.sensitivity import Effect
from autocompress.core.space import Choice


def anchors(distances: Mapping[Choice, float]) -> list[Choice]:
    """The middle one and the farthest of the choices that are some way from the original; all where there are two."""
    away = sorted((c for c, far in distances.items() if far > 0), key=lambda c: distances[c])
    return [away[i] for i in sorted({(len(away) - 1) // 2, len(away) - 1})] if away else []


def between(known: Mapping[Choice, Effect], distances: Mapping[Choice, float]) -> dict[Choice, Effect]:
    """The known effects, with losses that do not fall on the way, and those of choices that lie between two of them.

    The root of the loss is linear between neighbours, and the cost is. Choices that are not on the line stay as they
    are; one that is beyond all known ones has no effect.
    """
    found = dict(known)
    line = sorted((c for c in known if c in distances), key=lambda c: distances[c])
    if not line:
        return found
    places = [distances[c] for c in line]
    losses = np.maximum.accumulate([known[c].loss for c in line])
    costs = [known[c].cost for c in line]
    for choice, loss in zip(line, losses.tolist(), strict=True):
        if loss > known[choice].loss:
            found[choice] = replace(known[choice], loss=loss)
    for choice, far in distances.items():
        if choice not in known and places[0] < far < places[-1]:
            root, cost = np.interp(far, places, np.sqrt(losses)), np.interp(far, places, costs)
            found[choice] = Effect(loss=float(root) ** 2, cost=float(cost), probed=False)
    return found

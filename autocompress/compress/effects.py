"""From probes to tables: which choices are probed, and what follows for those that were not."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autocompress.core.sensitivity import Effect
from autocompress.core.space import Choice, Space

ORIGINAL = Effect(loss=0.0, cost=0.0, probed=False)
NO_TIME = "no time was left for it"
NOT_PROBED: Mapping[str, str] = {
    "student": "a student has weights of its own: only a trial scores it",
    "float": "float arithmetic is the runtime's: only a trial scores it",
    "calibrator": "every probe takes the lowest and highest value seen",
    "recipe": "a recipe trains: only a trial scores it",
}
CUTS = ("width", "heads", "skip", "rank", "sparsity")
Key = tuple[str, Choice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that are rounded together: each has a choice's precision, or its own first where it may not have that."""

    name: str
    layers: tuple[str, ...]
    precisions: tuple[str, ...]


def units(space: Space) -> tuple[Unit, ...]:
    """A layer each, but all together where one precision is chosen for the model."""
    found = []
    for block, members in space.members.items():
        if space.precision_by == "model":
            union = tuple(dict.fromkeys(p for n in members for p in space.precisions[n]))
            found.append(Unit(name=f"precision:{block}", layers=tuple(members), precisions=union))
        else:
            found += [Unit(name=f"layer:{n}", layers=(n,), precisions=space.precisions[n]) for n in members]
    return tuple(unit for unit in found if len(unit.precisions) > 1)


def planned(space: Space) -> list[Key]:
    """What is probed, first what a short time is spent best on.

    That is each layer's first bits, then the ends of what is cut, their middles, and further bits.
    """
    bits = [[(unit.name, p) for p in unit.precisions if p != "fp32"] for unit in units(space)]
    cuts = {name: choices for name, choices in space.variables.items() if kind_of(name) in CUTS}
    lines = {name: distances(space, name) for name in cuts}
    probed = {name: anchors(line) for name, line in lines.items()}
    keys: list[Key] = [key for unit in bits for key in unit[:1]]
    keys += [(name, found[-1]) for name, found in probed.items() if found]
    keys += [(name, choice) for name, found in probed.items() for choice in found]
    keys += [(name, choice) for name, choices in cuts.items() for choice in choices if choice not in lines[name]]
    keys += [key for unit in bits for key in unit]
    return list(dict.fromkeys(keys))


def tables(
    space: Space, found: Mapping[Key, Effect], failed: Mapping[Key, str]
) -> tuple[dict[str, dict[str, Effect]], dict[str, str]]:
    """Effects by variable and choice, and why there are none, for all variables of the space.

    Args:
        found, failed: probes by what was planned.
    """
    effects: dict[str, dict[str, Effect]] = {}
    left_out: dict[str, str] = {}
    parts = units(space)
    for name, choices in space.variables.items():
        kind = kind_of(name)
        if kind in NOT_PROBED:
            left_out[name] = NOT_PROBED[kind]
            continue
        known, missing = _cut(space, name, found, failed) if kind in CUTS else _bits(space, name, parts, found, failed)
        ordered = {str(c): known[c] for c in choices if c in known}
        if all(effect is ORIGINAL for effect in ordered.values()):
            left_out[name] = next(iter(missing.values()), NO_TIME)
        else:
            effects[name] = ordered
            left_out |= {f"{name}={choice}": why for choice, why in missing.items()}
    return effects, left_out


def distances(space: Space, name: str) -> dict[Choice, float]:
    """How far each choice of a cut is from the original, for those that lie on a line with it."""
    kind, choices = kind_of(name), space.variables[name]
    if kind == "sparsity":
        return {c: float(c) for c in choices if not isinstance(c, str)}
    if kind == "skip":
        return {c: float(c) for c in choices}
    return {c: float(choices[0]) - float(c) for c in choices}


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


def allowed(space: Space, layer: str, precision: str) -> str:
    """A block's precision for a layer of it, or the layer's first where it may not have that."""
    return precision if precision in space.precisions[layer] else space.precisions[layer][0]


def kind_of(name: str) -> str:
    """The kind of a variable."""
    return name.partition(":")[0]


def _cut(
    space: Space, name: str, found: Mapping[Key, Effect], failed: Mapping[Key, str]
) -> tuple[dict[Choice, Effect], dict[Choice, str]]:
    choices, line = space.variables[name], distances(space, name)
    known = {c: found[name, c] for c in choices if (name, c) in found}
    known |= {c: ORIGINAL for c in choices if line.get(c) == 0}
    known = between(known, line)
    why = next((failed[name, c] for c in choices if (name, c) in failed), NO_TIME)
    return known, {c: failed.get((name, c), why) for c in choices if c not in known}


def _bits(
    space: Space, name: str, parts: tuple[Unit, ...], found: Mapping[Key, Effect], failed: Mapping[Key, str]
) -> tuple[dict[Choice, Effect], dict[Choice, str]]:
    """Of a layer, or of a block: the sum of its layers."""
    kind, _, rest = name.partition(":")
    members = {rest} if kind == "layer" else set(space.members[rest])
    mine = [unit for unit in parts if members.issuperset(unit.layers)]
    known: dict[Choice, Effect] = {}
    missing: dict[Choice, str] = {}
    for choice in space.precisions[rest] if kind == "layer" else space.variables[name]:
        keys = [(unit.name, choice if choice in unit.precisions else unit.precisions[0]) for unit in mine]
        keys = [key for key in keys if key[1] != "fp32"]
        lacking = [key for key in keys if key not in found]
        if lacking:
            missing[choice] = failed.get(lacking[0], NO_TIME)
        else:
            known[choice] = _sum([found[key] for key in keys], len(mine))
    return known, missing


def _sum(effects: list[Effect], of: int) -> Effect:
    if not effects:
        return ORIGINAL
    if len(effects) == of == 1:
        return effects[0]
    return Effect(loss=sum(e.loss for e in effects), cost=max(-1.0, sum(e.cost for e in effects)), probed=False)

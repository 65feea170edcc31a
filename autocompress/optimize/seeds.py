"""Where a search begins: whole policies from what single choices do, as if that added up.

For a price λ of latency each variable takes the choice with the least loss + λ·cost by itself (Shoham & Gersho,
Efficient bit allocation for an arbitrary set of quantizers, 1988). Every λ gives a policy that no other mix of the same
choices beats in the sum; sweeping λ walks along the predicted front.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from autocompress.core.sensitivity import Effect
from autocompress.core.space import INHERIT, Choice, Values

PRICES = 400  # tried at most: each is a walk over all variables
NEGLIGIBLE = 1e-4  # of a loss: probabilities differ by less than 1 %
LOST = 2.0  # nats: probabilities differ by up to 93 %, and what a policy of such losses gives is hardly the model's
Effects = Mapping[str, Mapping[str, Effect]]
Table = Mapping[Choice, Effect]
Point = tuple[float, float]
T = TypeVar("T")
_NOTHING = Effect(loss=0.0, cost=0.0, probed=False)


def sweep(
    effects: Effects,
    variables: Mapping[str, tuple[Choice, ...]],
    count: int,
    *,
    blocks: Mapping[str, str] | None = None,
) -> list[Values]:
    """At most `count` distinct policies along the predicted front, from nearly lossless to cheapest.

    A policy has a value for every variable; a variable without effects takes its first choice, and so does one whose
    choices with an effect win nothing. A variable `layer:<name>` stays at "block" unless its own choice has less
    loss + λ·cost than its block's. The policy of first choices alone is not among them: it is a baseline. Nor are
    choices without an effect, nor, where there are others, policies that lose more than LOST in the sum.

    Args:
        effects: loss and cost by variable and choice as text.
        blocks: the block of each layer; one that is not named belongs to the block whose name its own begins with.
    """
    if count < 1:
        return []
    tables = {name: _table(effects[name], choices) for name, choices in variables.items() if effects.get(name)}
    layers = _by_block(tables, blocks or {})
    first = {name: choices[0] for name, choices in variables.items()}
    found: dict[tuple[Choice, ...], dict[str, Choice]] = {}
    for price in _prices([table for name, table in tables.items() if not layers.get(name)] + _own(tables, layers)):
        policy = {**first, **_policy(tables, layers, price)}
        found.setdefault(_meant(policy, layers), policy)
    found.pop(_meant(first, layers), None)
    policies = list(found.values())
    points = [predicted(effects, policy, blocks=blocks) for policy in policies]
    alive = [i for i, (loss, _) in enumerate(points) if loss <= LOST] or range(len(points))
    return [policies[alive[i]] for i in _spread([points[i] for i in alive], count)]


def predicted(effects: Effects, values: Values, *, blocks: Mapping[str, str] | None = None) -> Point:
    """Loss, and latency as a share of fp32's, by which policies are put in order.

    Losses are added up. So is what is saved by precisions, each of which is of other layers; what is left by that and
    by each cut is multiplied, since what is gone cannot be made integer, or cut, once more.
    """
    loss, integer, cut = 0.0, 1.0, 1.0
    for name, value in values.items():
        kind, _, rest = name.partition(":")
        effect = _effect(effects, name, value)
        if kind == "layer" and value != INHERIT:
            block = _block_of(rest, [n.removeprefix("precision:") for n in values], blocks or {})
            shared = _effect(effects, name, values.get(f"precision:{block}", ""))
            loss -= shared.loss
            integer -= shared.cost
        if kind in ("precision", "layer"):
            integer += effect.cost
        else:
            cut *= 1 + effect.cost
        loss += effect.loss
    return max(0.0, loss), max(0.0, integer) * cut


def _table(effects: Mapping[str, Effect], choices: tuple[Choice, ...]) -> dict[Choice, Effect]:
    """Effects by choice, in the order of the choices; a layer's "block" has none of its own."""
    own = [c for c in choices if c != INHERIT]
    known = {c: effects[str(c)] for c in own if str(c) in effects}
    return known if INHERIT in choices or own[0] in known else {own[0]: _NOTHING, **known}


def _by_block(tables: Mapping[str, Table], blocks: Mapping[str, str]) -> dict[str, list[str]]:
    """Variables of layers, by the variable of their block."""
    shared = [name.removeprefix("precision:") for name in tables if name.startswith("precision:")]
    found: dict[str, list[str]] = {}
    for name in tables:
        if name.startswith("layer:"):
            block = _block_of(name.removeprefix("layer:"), shared, blocks)
            found.setdefault(f"precision:{block}", []).append(name)
    return found


def _block_of(layer: str, known: Sequence[str], blocks: Mapping[str, str]) -> str:
    """The block that is said to be a layer's, else the longest name that its own begins with; none is empty."""
    if layer in blocks:
        return blocks[layer]
    return max((b for b in known if layer == b or layer.startswith(f"{b}.")), key=len, default="")


def _own(tables: Mapping[str, Table], layers: Mapping[str, Sequence[str]]) -> list[Table]:
    return [tables[name] for names in layers.values() for name in names] + [tables[b] for b in layers if b in tables]


def _policy(tables: Mapping[str, Table], layers: Mapping[str, Sequence[str]], price: float) -> dict[str, Choice]:
    """The best choice of every variable that has effects."""
    policy = {name: _best(table, price) for name, table in tables.items() if not name.startswith("layer:")}
    for block, names in layers.items():
        for name in names:
            table = tables[name]
            own, shared = _best(table, price), policy.get(block)
            if shared is None or shared not in table:
                shared = next(iter(table))
            better = _price(table[own], price) < _price(table[shared], price)
            policy[name] = own if better else INHERIT
    return policy


def _meant(policy: Values, layers: Mapping[str, Sequence[str]]) -> tuple[Choice, ...]:
    """What tells policies apart: layers with their own precision and with the same one of their block are alike."""
    block_of = {name: block for block, names in layers.items() for name in names}
    meant = {n: policy.get(block_of.get(n, ""), value) if value == INHERIT else value for n, value in policy.items()}
    return tuple(value for name, value in meant.items() if name not in layers)


def _best(table: Table, price: float) -> Choice:
    """The choice of the least loss + price·cost; of equal ones the first."""
    return min(table, key=lambda choice: _price(table[choice], price))


def _price(effect: Effect, price: float) -> tuple[float, float]:
    """What a choice costs in all, then what breaks a tie: the loss where only latency counts, else the latency."""
    if math.isinf(price):
        return effect.cost, effect.loss
    return effect.loss + price * effect.cost, effect.cost


def _prices(tables: Sequence[Table]) -> list[float]:
    """A price between every two at which some variable changes its mind, none at first, any at last."""
    turns = sorted({turn for table in tables for turn in _turns(table)})
    if len(turns) > PRICES:
        turns = [turns[i] for i in _even(len(turns), PRICES)]
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(turns)]
    ends = [turns[0] / 2, *middles, turns[-1] * 2] if turns else []
    return [0.0, *ends, math.inf]


def _turns(table: Table) -> list[float]:
    """Prices at which a lower cost begins to pay: the slopes of the lower convex hull of loss over cost."""
    effects = sorted({(e.loss, e.cost) for e in table.values()})
    at, turns = effects[0], list[float]()
    while cheaper := [(loss, cost) for loss, cost in effects if cost < at[1]]:
        turn, at = min(((loss - at[0]) / (at[1] - cost), (loss, cost)) for loss, cost in cheaper)
        turns.append(turn)
    return [turn for turn in turns if turn > 0]


def _effect(effects: Effects, name: str, value: Choice) -> Effect:
    return effects.get(name, {}).get(str(value), _NOTHING)


def _spread(points: Sequence[Point], count: int) -> list[int]:
    """At most `count` of the points, in order of falling latency, at equal distances along the way.

    Points that a cheaper one beats but for a negligible loss are taken only where there are not enough others. A step
    counts by the latency it saves and by what the answers change. Of two distributions with a KL divergence of d the
    probabilities differ by √(1 − e^−d) at most (Bretagnolle & Huber, 1979): beyond a few nats all is lost, and no point
    there is farther than another.
    """
    if not points:
        return []
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0]))
    least = np.minimum.accumulate([points[i][0] for i in reversed(order)])[::-1]
    better = [
        i for i, cheaper in zip(order, [*least[1:], math.inf], strict=True) if cheaper > points[i][0] + NEGLIGIBLE
    ]
    order = better if len(better) >= count else order
    if len(order) <= count:
        return order
    places = np.array([(math.sqrt(-math.expm1(-points[i][0])), points[i][1]) for i in order])
    way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(places, axis=0)).sum(1))])
    wanted = np.linspace(0.0, way[-1], count)
    chosen: list[int] = []
    for i, target in enumerate(wanted):
        low = chosen[-1] + 1 if chosen else 0
        high = len(order) - (count - 1 - i)
        chosen.append(low + int(np.argmin(np.abs(way[low:high] - target))))
    return [order[i] for i in chosen]


def _even(total: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, total - 1, count)})

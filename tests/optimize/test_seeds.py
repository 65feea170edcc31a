"""Properties of the sweep: what policies it gives, in which order, and that none is beaten in the sum."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core.sensitivity import Effect
from autocompress.core.space import Choice
from autocompress.optimize.seeds import LOST, Effects, predicted, sweep

Variables = dict[str, tuple[Choice, ...]]
FP32 = Effect(loss=0.0, cost=0.0)
LOSSES = st.floats(0, LOST / 4)  # of at most four variables
COSTS = st.floats(-0.9, 0.2)


@st.composite
def tables(draw: Any, names: int = 4) -> tuple[Effects, Variables]:
    """Widths with two to four choices, the first of them the original; one variable in five has no effects."""
    effects: dict[str, dict[str, Effect]] = {}
    variables: Variables = {}
    for i in range(draw(st.integers(1, names))):
        name, choices = f"width:g{i}", (32, 24, 16, 8)[: draw(st.integers(2, 4))]
        variables[name] = choices
        if draw(st.integers(0, 4)):
            rest = {str(c): Effect(loss=draw(LOSSES), cost=draw(COSTS)) for c in choices[1:]}
            effects[name] = {str(choices[0]): Effect(loss=0.0, cost=0.0), **rest}
    return effects, variables


def in_sum(effects: Effects, values: Any) -> tuple[float, float]:
    picked = [effects[name][str(value)] for name, value in values.items() if name in effects]
    return sum(e.loss for e in picked), sum(e.cost for e in picked)


@given(tables(), st.integers(0, 12))
def test_policies_are_whole_distinct_and_of_the_space(made: tuple[Effects, Variables], count: int) -> None:
    effects, variables = made
    policies = sweep(effects, variables, count)
    assert len(policies) <= count
    assert len({tuple(p.values()) for p in policies}) == len(policies)
    for policy in policies:
        assert list(policy) == list(variables)
        assert all(value in variables[name] for name, value in policy.items())
        assert all(policy[name] == choices[0] for name, choices in variables.items() if name not in effects)
        assert policy != {name: choices[0] for name, choices in variables.items()}


@given(tables())
@settings(max_examples=60)
def test_no_mix_of_the_same_choices_beats_a_policy_in_the_sum(made: tuple[Effects, Variables]) -> None:
    effects, variables = made
    every = [dict(zip(variables, mix, strict=True)) for mix in itertools.product(*variables.values())]
    sums = [in_sum(effects, mix) for mix in every]
    for policy in sweep(effects, variables, 30):
        loss, cost = in_sum(effects, policy)
        assert not any(a < loss - 1e-9 and b < cost - 1e-9 for a, b in sums)


@given(tables())
def test_the_cheapest_and_the_nearly_lossless_are_among_them(made: tuple[Effects, Variables]) -> None:
    effects, variables = made
    policies = sweep(effects, variables, 3)
    cheapest = sum(min(e.cost for e in table.values()) for table in effects.values())
    if cheapest < 0:
        assert in_sum(effects, policies[-1])[1] == pytest.approx(cheapest)
    points = [predicted(effects, p) for p in policies]
    assert [latency for _, latency in points] == sorted((latency for _, latency in points), reverse=True)


def test_policies_lie_along_the_whole_front() -> None:
    """Ten equal groups, each worse than the one before: eleven policies, of which four are spread evenly."""
    effects = {
        f"width:{i}": {"8": Effect(loss=0.0, cost=0.0), "4": Effect(loss=0.02 * (i + 1), cost=-0.08)} for i in range(10)
    }
    policies = sweep(effects, dict.fromkeys(effects, (8, 4)), 4)
    cut = [sum(value == 4 for value in policy.values()) for policy in policies]
    assert cut[0] == 1
    assert cut[-1] == 10
    assert max(b - a for a, b in itertools.pairwise(cut)) <= 4
    assert all(policy["width:0"] == 4 for policy in policies)


def test_what_loses_next_to_nothing_is_passed_over_where_there_is_enough_else() -> None:
    """Steps that cost no accuracy are no news: the search begins where they all are taken."""
    free = {
        f"width:f{i}": {"8": Effect(loss=0.0, cost=0.0), "4": Effect(loss=1e-6 * (i + 1), cost=-0.02)} for i in range(9)
    }
    dear = {f"width:d{i}": {"8": FP32, "4": Effect(loss=0.1 + 0.5 * i, cost=-0.1)} for i in range(3)}
    effects = {**free, **dear}
    policies = sweep(effects, dict.fromkeys(effects, (8, 4)), 3)
    assert all(policy[name] == 4 for policy in policies for name in free)
    assert len(sweep(effects, dict.fromkeys(effects, (8, 4)), 12)) == 12


def test_none_is_of_a_model_that_is_lost() -> None:
    """Ten groups of half a nat each: policies end where four of them are cut; where each loses all, any will do."""
    effects = {f"width:{i}": {"8": FP32, "4": Effect(loss=0.5, cost=-0.05 - 0.001 * i)} for i in range(10)}
    cuts = [sum(v == 4 for v in policy.values()) for policy in sweep(effects, dict.fromkeys(effects, (8, 4)), 20)]
    assert cuts == [1, 2, 3, 4]
    lost = {name: {"8": FP32, "4": Effect(loss=5.0, cost=-0.05)} for name in effects}
    assert sweep(lost, dict.fromkeys(lost, (8, 4)), 20)


BITS: Variables = {
    "precision:b": ("fp32", "w8a8"),
    "layer:b.good": ("block", "fp32", "w8a8"),
    "layer:b.bad": ("block", "fp32", "w8a8"),
}


def bits(bad: float) -> Effects:
    good, poor = Effect(loss=0.001, cost=-0.3), Effect(loss=bad, cost=-0.1)
    both = Effect(loss=good.loss + bad, cost=-0.4)
    return {
        "precision:b": {"fp32": FP32, "w8a8": both},
        "layer:b.good": {"fp32": FP32, "w8a8": good},
        "layer:b.bad": {"fp32": FP32, "w8a8": poor},
    }


def test_a_layer_leaves_its_block_only_where_its_own_choice_is_better() -> None:
    mixed, whole = sweep(bits(bad=0.1), BITS, 5)
    assert whole == {"precision:b": "w8a8", "layer:b.good": "block", "layer:b.bad": "block"}
    own = {name: mixed["precision:b"] if mixed[name] == "block" else mixed[name] for name in BITS if name[0] == "l"}
    assert own == {"layer:b.good": "w8a8", "layer:b.bad": "fp32"}
    assert list(mixed.values()).count("block") == 1


def test_layers_that_agree_with_their_block_are_left_to_it() -> None:
    (only,) = sweep(bits(bad=0.1 / 300), BITS, 1)
    assert only == {"precision:b": "w8a8", "layer:b.good": "block", "layer:b.bad": "block"}


def test_a_layers_own_precision_counts_in_the_place_of_its_blocks() -> None:
    effects = bits(bad=0.1)
    mixed = {"precision:b": "w8a8", "layer:b.good": "block", "layer:b.bad": "fp32"}
    assert predicted(effects, mixed) == pytest.approx((0.001, 0.7))
    assert predicted(effects, {**mixed, "layer:b.bad": "block"}) == pytest.approx((0.101, 0.6))


def test_blocks_may_have_names_that_their_layers_do_not_begin_with() -> None:
    effects = {name.replace("b.", "other."): table for name, table in bits(bad=0.1).items()}
    variables = {name.replace("b.", "other."): choices for name, choices in BITS.items()}
    policies = sweep(effects, variables, 5, blocks={"other.good": "b", "other.bad": "b"})
    assert [list(p.values()) for p in policies] == [list(p.values()) for p in sweep(bits(bad=0.1), BITS, 5)]
    assert policies[-1]["layer:other.bad"] == "block"


def test_what_is_gone_is_not_saved_once_more() -> None:
    effects = {
        "width:a": {"4": Effect(loss=0.1, cost=-0.9)},
        "precision:b": {"w8a8": Effect(loss=0.0, cost=-0.5)},
    }
    loss, left = predicted(effects, {"width:a": 4, "precision:b": "w8a8"})
    assert (loss, left) == pytest.approx((0.1, 0.05))


def test_without_effects_there_is_nothing_to_propose() -> None:
    assert sweep({}, {"width:a": (8, 4)}, 5) == []
    assert sweep({"width:a": {}}, {"width:a": (8, 4)}, 5) == []


def test_a_hundred_and_fifty_variables_are_swept_within_a_second() -> None:
    import time

    effects = {
        f"width:{i}": {
            str(c): Effect(loss=(8 - c) ** 2 * 0.001 * (i + 1), cost=-0.0005 * (8 - c)) for c in range(8, 1, -1)
        }
        for i in range(150)
    }
    begun = time.process_time()
    assert len(sweep(effects, dict.fromkeys(effects, tuple(range(8, 1, -1))), 20)) == 20
    assert time.process_time() - begun < 1.5

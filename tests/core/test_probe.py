from dataclasses import replace

import pytest

from autocompress.core.candidate import SparsityName
from autocompress.core.probe import Effect, Finding, Payoff, Probe, Stair, Verdict, named, paying, sparse, subject
from autocompress.core.record import dump, load
from autocompress.core.space import SpaceRules
from tests.core.test_space import PROFILE, RULES, STRUCTURE

EFFECT = Effect(ratio=0.5, ratio_ci=(0.45, 0.55), size_ratio=0.3, sqnr_db=None)
STAIR = Stair(
    groups=("a.conv1", "other"),
    module="a",
    precision="w8a8",
    widths=(64, 56, 48, 40, 32, 16),
    ratios=(1.0, 0.99, 0.8, 0.79, 0.6, 0.3),
    edges=(64, 48, 32, 16),
)


def verdict(choice: str, layers: tuple[str, ...] = (), **changes: object) -> Verdict:
    plain = Verdict(choice=choice, layers=layers, usable=True, faster=False, smaller=False, why=f"{choice} is slow")
    return replace(plain, **changes)  # type: ignore[arg-type]


def probe(*verdicts: Verdict, stairs: tuple[Stair, ...] = ()) -> Probe:
    return Probe(
        task="t",
        target="p",
        subject="s",
        fingerprint={"cpu_model": "Test CPU"},
        created="2026-11-23T00:00:00.000+00:00",
        seconds=1.0,
        verdicts=verdicts,
        stairs=stairs,
        findings=(
            Finding(choice="w8a8", layers=("head",), beside="fp32", effect=EFFECT),
            Finding(choice="w4a8", layers=("head",), beside="fp32", effect="load: no kernel"),
        ),
        left_out=("bf16",),
    )


def payoff(*verdicts: Verdict, size_counts: bool = False, stairs: tuple[Stair, ...] = ()) -> Payoff:
    return Payoff(probe=probe(*verdicts, stairs=stairs), size_counts=size_counts)


def test_a_probe_survives_its_record() -> None:
    found = probe(verdict("w8a8", ("head",)), stairs=(STAIR,))
    assert load(Probe, dump(found, 1), 1) == found


@pytest.mark.parametrize(("high", "faster"), [(0.99, True), (1.0, False), (1.01, False)])
def test_faster_is_said_of_a_whole_interval_below_one(high: float, faster: bool) -> None:
    assert replace(EFFECT, ratio_ci=(0.4, high)).faster is faster


@pytest.mark.parametrize(
    ("changes", "for_latency", "for_size"),
    [
        ({}, False, False),
        ({"faster": True}, True, True),
        ({"smaller": True}, False, True),
        ({"faster": True, "smaller": True, "usable": False}, False, False),
    ],
)
def test_what_pays(changes: dict[str, bool], for_latency: bool, for_size: bool) -> None:
    found = verdict("w8a8", **changes)
    assert (found.pays(False), found.pays(True)) == (for_latency, for_size)


def test_of_several_verdicts_on_a_layer_the_last_one_holds() -> None:
    asked = payoff(verdict("w8a8", ("a", "b"), faster=True), verdict("w8a8", ("b",)))
    assert asked.against("w8a8", "a") is None
    assert asked.against("w8a8", "b") == "w8a8 is slow"


def test_nothing_is_said_against_what_was_not_measured() -> None:
    asked = payoff(verdict("w8a8", ("a",)))
    assert asked.against("w8a8", "b") is None
    assert asked.against("w4a8", "a") is None
    assert asked.against_sparsity(0.5, "a") is None
    assert asked.snap("a", 17) == 17


@pytest.mark.parametrize(
    ("zeros", "dropped"), [(0.0, False), (0.3, True), (0.5, True), (0.7, False), (0.9, False), (0.95, False)]
)
def test_zeros_are_judged_by_the_next_share_measured_above(zeros: SparsityName, dropped: bool) -> None:
    asked = payoff(verdict(sparse(0.5)), verdict(sparse(0.9), faster=True), verdict(sparse("2:4")))
    assert (asked.against_sparsity(zeros, "a") is not None) is dropped


def test_a_pattern_of_zeros_is_judged_by_itself() -> None:
    assert payoff(verdict(sparse(0.9))).against_sparsity("2:4", "a") is None
    assert payoff(verdict(sparse("2:4"))).against_sparsity("2:4", "a") == "sparsity 2:4 is slow"


@pytest.mark.parametrize(
    ("width", "snapped"),
    [(64, 64), (60, 64), (56, 64), (52, 52), (48, 48), (44, 48), (40, 48), (36, 36), (32, 32), (24, 24), (8, 8)],
)
def test_a_width_goes_up_to_the_edge_of_its_plateau_as_far_as_that_was_measured(width: int, snapped: int) -> None:
    assert STAIR.snap(width) == snapped


def test_a_space_without_what_does_not_pay() -> None:
    space = RULES.resolve(STRUCTURE, PROFILE, has_student=True)
    found = paying(
        space,
        payoff(
            verdict("w4a8", ("a.conv1", "a.conv2")),
            verdict("w8a8", ("a.conv2",)),
            verdict(sparse(0.9), ("a.conv1", "a.conv2", "head")),
            stairs=(replace(STAIR, widths=(64, 48, 32, 16), edges=(64, 32, 16)),),
        ),
    )
    assert found.precisions["a.conv1"] == ("fp32", "w8a8")
    assert found.precisions["a.conv2"] == ("fp32",)
    assert found.precisions["head"] == space.precisions["head"]
    assert found.sparsities["a.conv1"] == (0.0,)
    assert space.widths["a.conv1"] == (64, 48, 32, 16)
    assert found.widths["a.conv1"] == (64, 32, 16)
    assert found.widths["a.conv2"] == space.widths["a.conv2"]
    assert found.dropped == {
        **space.dropped,
        "w4a8 of a.conv1, a.conv2": "w4a8 is slow",
        "w8a8 of a.conv2": "w8a8 is slow",
        "sparsity 0.5 of a.conv1, a.conv2, head": "sparsity 0.9 is slow",
        "width 48 of a.conv1": "no faster than the next wider one",
    }


def test_arithmetic_that_does_not_pay_is_no_variable_but_stays_a_baseline() -> None:
    rules = SpaceRules(name="r", description="")
    space = rules.resolve(STRUCTURE, replace(PROFILE, float_precisions=("fp32", "bf16")))
    assert "float" in space.variables
    found = paying(space, payoff(verdict("bf16")))
    assert "float" not in found.variables
    assert (found.float_precisions, found.float_unpaid) == (("fp32",), ("bf16",))
    assert found.dropped["bf16"] == "bf16 is slow"


def test_layers_of_a_message_are_few() -> None:
    assert named(("",)) == named(()) == ""
    assert named(("a", "b")) == " of a, b"
    assert named(("a", "b", "c", "d", "e")) == " of a, b, c and 2 more"


def test_a_subject_is_another_one_where_shapes_or_options_are() -> None:
    inputs = {"x": (3, 8, 8)}
    same = subject(STRUCTURE, inputs, PROFILE)
    assert subject(STRUCTURE, inputs, replace(PROFILE, name="q", description="other words")) == same
    assert subject(STRUCTURE, {"x": (3, 16, 16)}, PROFILE) != same
    assert subject(STRUCTURE, inputs, replace(PROFILE, options={"threads": 2})) != same
    assert subject(replace(STRUCTURE, groups=STRUCTURE.groups[:1]), inputs, PROFILE) != same

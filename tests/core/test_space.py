from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core.candidate import Candidate, LayerChoice, Sparsity
from autocompress.core.errors import ConfigError, InputError
from autocompress.core.profile import Profile
from autocompress.core.recipe import Plan, Prune, Quantize, Stage, Train
from autocompress.core.space import (
    Group,
    Heads,
    Layer,
    LayerRule,
    Ranks,
    Space,
    SpaceRules,
    Structure,
    WidthRule,
    with_stages_that_pay,
)

STRUCTURE = Structure(
    layers=(
        Layer(name="embed", kind="embedding", shape=(100, 32), block="embed"),
        Layer(name="a.conv1", kind="conv2d", shape=(64, 3, 3, 3), block="a"),
        Layer(name="a.conv2", kind="conv2d", shape=(48, 64, 3, 3), block="a"),
        Layer(name="head", kind="linear", shape=(10, 48), block="head"),
    ),
    groups=(
        Group(name="a.conv1", width=64, step=1, layers=("a.conv1",)),
        Group(name="a.conv2", width=48, step=3, layers=("a.conv2", "head")),
    ),
)
PROFILE = Profile(
    name="p",
    description="",
    runtime="onnxruntime",
    format="onnx",
    precisions={"conv2d": ("w8a8", "w4a8"), "linear": ("w8a8",), "embedding": ("w8a32",)},
    width_multiple=8,
)
RULES = SpaceRules(
    name="r",
    description="",
    layers=(
        LayerRule(kind=("conv2d", "linear"), precisions=("fp32", "w8a8", "w4a8"), sparsities=(0.0, 0.5)),
        LayerRule(kind=("embedding",), precisions=("fp32", "w8a32")),
    ),
    widths=(WidthRule(ratios=(1.0, 0.75, 0.5, 0.25)),),
    students=(0.5,),
    calibrators=("minmax", "percentile"),
)
SPACE = RULES.resolve(STRUCTURE, PROFILE, has_student=True)


def values(space: Space = SPACE) -> st.SearchStrategy[dict[str, Any]]:
    """Any values of the space's variables."""
    return st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in space.variables.items()})


def test_variables_are_what_has_a_choice() -> None:
    assert SPACE.variables == {
        "student": (0.0, 0.5),
        "width:a.conv1": (64, 48, 32, 16),
        "width:a.conv2": (48, 24),  # multiples of the convolution's own groups and of the profile's step
        "precision:embed": ("fp32", "w8a32"),
        "precision:a": ("fp32", "w8a8", "w4a8"),
        "sparsity:a": (0.0, 0.5),
        "layer:a.conv1": ("block", "fp32", "w8a8", "w4a8"),
        "layer:a.conv2": ("block", "fp32", "w8a8", "w4a8"),
        "precision:head": ("fp32", "w8a8"),
        "sparsity:head": (0.0, 0.5),
        "calibrator": ("minmax", "percentile"),
    }


@given(values())
def test_every_choice_decodes_to_a_candidate_that_the_device_allows(chosen: dict[str, Any]) -> None:
    candidate = SPACE.decode(chosen)
    kinds = {layer.name: layer.kind for layer in STRUCTURE.layers}
    for name, choice in candidate.layers.items():
        assert PROFILE.allows(kinds[name], replace(choice, sparsity=None).precision)
    for group in STRUCTURE.groups:
        assert candidate.widths.get(group.name, group.width) in SPACE.widths[group.name]


@given(values(), values())
def test_own_precision_wins_over_the_blocks_and_block_means_the_blocks(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    shared = one["precision:a"]
    inherited = SPACE.decode({**one, "layer:a.conv1": "block"})
    assert inherited.digest == SPACE.decode({**one, "layer:a.conv1": shared}).digest
    own = {**one, "layer:a.conv1": "w4a8"}
    choice = SPACE.decode({**own, "precision:a": other["precision:a"]}).layers["a.conv1"]
    assert choice.precision == "w4a8"


@given(values())
def test_values_that_mean_the_same_give_equal_candidates(chosen: dict[str, Any]) -> None:
    candidate = SPACE.decode(chosen)
    with_student = {**chosen, "student": 0.5}
    assert SPACE.decode({**with_student, "width:a.conv1": 64}).digest == SPACE.decode(with_student).digest
    first = {name: value for name, value in chosen.items() if value != SPACE.variables[name][0]}
    assert SPACE.decode(first).digest == candidate.digest
    if all(choice.kernel == "float" for choice in candidate.layers.values()):
        assert SPACE.decode({**chosen, "calibrator": "percentile"}).digest == candidate.digest


def test_nothing_chosen_is_the_original() -> None:
    assert SPACE.decode({}) == Candidate()
    assert SPACE.decode({name: choices[0] for name, choices in SPACE.variables.items()}) == Candidate()


def test_calibrator_counts_where_a_layer_is_integer() -> None:
    chosen = {"precision:a": "w8a8"}
    assert SPACE.decode({**chosen, "calibrator": "percentile"}).recipe.calibrator == "percentile"
    assert SPACE.decode(chosen).digest != SPACE.decode({**chosen, "calibrator": "percentile"}).digest


def test_recovery_steps_are_part_of_the_candidate() -> None:
    assert SPACE.decode({}, recover_steps=7).recipe.recover_steps == 7


@given(
    st.integers(2, 300),
    st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32]),
    st.sampled_from([1, 4, 8, 16]),
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
)
def test_widths_are_multiples_of_the_groups_step_descend_and_hold_the_original(
    parts: int, step: int, multiple: int, ratios: list[float]
) -> None:
    group = Group(name="g", width=parts * step, step=step, layers=("a.conv1",))
    rules = replace(RULES, widths=(WidthRule(ratios=tuple(ratios)),))
    space = rules.resolve(replace(STRUCTURE, groups=(group,)), replace(PROFILE, width_multiple=multiple))
    widths = space.widths.get("g", (group.width,))
    assert widths[0] == group.width
    assert list(widths) == sorted(set(widths), reverse=True)
    assert all(width % step == 0 and width > 0 for width in widths)
    assert all(width % multiple == 0 for width in widths[1:])


def test_last_matching_rule_wins_by_glob_and_by_kind() -> None:
    rules = SpaceRules(
        name="r",
        description="",
        layers=(
            LayerRule(precisions=("fp32", "w8a8"), sparsities=(0.0, 0.9)),
            LayerRule(name="a.*", precisions=("w4a8",)),
            LayerRule(name="a.conv2", kind=("linear",), precisions=("fp32",)),
        ),
        widths=(WidthRule(ratios=(0.5,)), WidthRule(name="a.conv2", ratios=(1.0,))),
    )
    space = rules.resolve(STRUCTURE, PROFILE)
    assert space.precisions["a.conv1"] == space.precisions["a.conv2"] == ("w4a8",)
    assert space.precisions["head"] == ("fp32", "w8a8")
    assert space.sparsities["a.conv2"] == (0.0, 0.9)
    assert set(space.widths) == {"a.conv1"}
    assert "student" not in space.variables


@pytest.mark.parametrize("by", ["block", "layer", "model"])
def test_precision_is_shared_by_block_layer_or_model(by: Any) -> None:
    space = replace(RULES, precision_by=by).resolve(STRUCTURE, PROFILE)
    names = {name.removeprefix("precision:") for name in space.variables if name.startswith("precision:")}
    wanted = {"block": {"embed", "a", "head"}, "layer": {layer.name for layer in STRUCTURE.layers}, "model": {"all"}}
    assert names == wanted[by]
    overrides = any(name.startswith("layer:") for name in space.variables)
    assert overrides == (by == "block")


def test_what_the_device_does_not_list_is_dropped_with_the_reason() -> None:
    assert SPACE.dropped == {"w4a8 for linear layers": "profile p does not list it as paying there"}
    assert "w4a8" not in SPACE.precisions["head"]


PATTERN = SpaceRules(name="r", description="", layers=(LayerRule(sparsities=(0.0, "2:4", 0.5)),))


def test_the_pattern_2_4_is_a_choice_where_kernels_skip_it_and_channels_come_in_fours() -> None:
    space = PATTERN.resolve(STRUCTURE, replace(PROFILE, sparse_kernels=True))
    assert space.sparsities["a.conv2"] == space.sparsities["head"] == (0.0, "2:4", 0.5)
    assert space.sparsities["a.conv1"] == space.sparsities["embed"] == (0.0, 0.5)
    assert space.dropped["2:4 for a.conv1"] == "it needs input channels in fours"
    layers = space.decode({"sparsity:a": "2:4", "sparsity:head": 0.5}).layers
    assert layers["a.conv2"].sparsity == Sparsity(ratio=0.5, pattern="2:4")
    assert layers["head"].sparsity == Sparsity(ratio=0.5)
    assert "a.conv1" not in layers
    assert space.uniform("fp32", sparsity=0.9)["sparsity:head"] == "2:4"


def test_a_device_without_kernels_for_the_pattern_drops_it_and_says_why() -> None:
    space = PATTERN.resolve(STRUCTURE, PROFILE)
    assert set(space.sparsities.values()) == {(0.0, 0.5)}
    assert space.dropped == {"2:4": "profile p has no kernels that skip its zeros"}


def test_integer_weights_that_overflow_are_replaced_and_the_reason_is_said() -> None:
    space = RULES.resolve(STRUCTURE, replace(PROFILE, integer_weight_bits=7))
    assert space.precisions["a.conv1"] == ("fp32", "w7a8", "w4a8")
    assert space.precisions["embed"] == ("fp32", "w8a32")
    assert "more than 7 bits overflow" in space.dropped["w8a8"]
    assert space.decode(space.uniform("w8a8")).layers["a.conv1"].weight_bits == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (LayerRule(name="a.conv3"),)}, "space 'r': Unknown layer 'a.conv3'. Did you mean 'a.conv2'"),
        ({"widths": (WidthRule(name="heads", ratios=(0.5,)),)}, "space 'r': Unknown channel group 'heads'"),
    ],
)
def test_a_rule_for_a_name_that_is_not_there_names_the_nearest(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RULES, **change).resolve(STRUCTURE, PROFILE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerRule(precisions=("int8",)), "a precision is 'fp32' or like 'w8a8'"),
        (lambda: LayerRule(sparsities=(1.0,)), r"`sparsities` must be 2:4, .*, got 1.0"),
        (lambda: WidthRule(ratios=(1.5,)), r"`ratios` must be in \(0, 1\], got 1.5"),
        (lambda: replace(RULES, calibrators=()), "`calibrators` must name at least one of minmax, percentile, mse"),
        (lambda: replace(RULES, students=(-1.0,)), "`students` must be positive widths, got -1.0"),
        (lambda: replace(PROFILE, width_multiple=0), "`width_multiple` must be at least 1, got 0"),
        (lambda: replace(PROFILE, integer_weight_bits=9), r"`integer_weight_bits` must be in 2..8, got 9"),
        (lambda: replace(PROFILE, precisions={"linear": ("w9a8",)}), "`weight_bits` must be one of .*, got 9"),
        (lambda: SPACE.decode({"precision:a": "w8a8", "calibrator": "minmix"}), "Unknown calibrator 'minmix'. Did you"),
    ],
)
def test_rules_and_profiles_refuse_what_they_cannot_mean(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.3])
def test_uniform_is_one_policy_everywhere_and_has_a_value_for_every_variable(ratio: float) -> None:
    chosen = SPACE.uniform("w8a8", ratio, 0.4)
    assert chosen.keys() == SPACE.variables.keys()
    assert all(value in SPACE.variables[name] for name, value in chosen.items())
    candidate = SPACE.decode(chosen)
    assert candidate.layers["embed" if "embed" in candidate.layers else "head"].kernel == "int8"
    assert {name: c.precision for name, c in candidate.layers.items()} == dict.fromkeys(
        ("a.conv1", "a.conv2", "head"), "w8a8"
    )
    assert candidate.layers["head"].sparsity is not None
    for name, widths in SPACE.widths.items():
        got = candidate.widths.get(name, widths[0])
        assert abs(got - ratio * widths[0]) == min(abs(w - ratio * widths[0]) for w in widths)


def test_executable_lowers_only_integer_layers_of_too_many_bits() -> None:
    profile = replace(PROFILE, integer_weight_bits=6)
    assert [profile.executable(p) for p in ("w8a8", "w6a8", "w4a8", "w8a32", "fp32", "k8a8")] == [
        "w6a8", "w6a8", "w4a8", "w8a32", "fp32", "k8a8",
    ]  # fmt: skip


def test_float_is_always_allowed() -> None:
    assert all(PROFILE.allows(kind, "fp32") for kind in ("conv1d", "linear", "anything"))
    assert LayerChoice().precision == "fp32"


TOPOLOGY = replace(STRUCTURE, heads=(Heads(name="attention", count=4),), blocks=("a", "b"))
TWO = (
    Plan(name="default"),
    Plan(name="aware", stages=(Stage(name="q", quantize=Quantize(aware=True), train=Train()),)),
)


def test_heads_blocks_ranks_and_recipes_are_variables_where_the_rules_have_them() -> None:
    rules = replace(
        RULES,
        layers=(*RULES.layers, LayerRule(name="a.*", ranks=(1.0, 0.25, 0.01))),
        heads=(0.5, 0.1),
        skip=("b*",),
        recipes=TWO,
    )
    space = rules.resolve(TOPOLOGY, PROFILE, has_student=True)
    found = {name: choices for name, choices in space.variables.items() if name not in SPACE.variables}
    # Full ranks: min(64, 3 * 9) and min(48, 64 * 9). A hundredth of the first is no rank at all.
    assert found == {
        "heads:attention": (4, 2, 1),
        "skip:b": (0, 1),
        "rank:a.conv1": (27, 7),
        "rank:a.conv2": (48, 12),
        "recipe": ("default", "aware"),
    }
    chosen = {"heads:attention": 2, "skip:b": 1, "rank:a.conv2": 12, "recipe": "aware"}
    candidate = space.decode(chosen, recover_steps=5)
    assert (candidate.heads, candidate.skipped) == ({"attention": 2}, ("b",))
    assert {name: choice.rank for name, choice in candidate.layers.items()} == {"a.conv2": 12}
    assert (candidate.recipe.name, candidate.recipe.stages) == ("aware", TWO[1].stages)
    student = space.decode({**chosen, "student": 0.5})
    assert (student.heads, student.skipped, student.layers) == ({}, (), {})


def test_a_rank_is_offered_only_where_it_makes_the_layer_smaller() -> None:
    def ranks(factors: str) -> Any:
        rule = LayerRule(kind=("conv2d",), ranks=(0.9, 0.5), factors=factors)  # type: ignore[arg-type]
        return replace(RULES, layers=(rule,)).resolve(STRUCTURE, PROFILE).ranks

    # 24 x (27 + 64) weights are more than 64 x 27; 14 x 91 are fewer.
    assert ranks("channel")["a.conv1"] == Ranks(choices=(27, 14))
    assert ranks("spatial")["a.conv1"] == Ranks(choices=(9, 8, 4), factors="spatial")


def test_stages_that_only_pay_sometimes_go_where_their_choices_do_not_pay() -> None:
    stages = (
        Stage(name="cut", prune=Prune(), train=Train(share=0.5), when="pays"),
        Stage(name="bits", quantize=Quantize(aware=True), train=Train(share=0.5), when="pays"),
    )
    space = replace(RULES, recipes=(Plan(name="p", stages=stages),)).resolve(STRUCTURE, PROFILE)
    assert with_stages_that_pay(space).recipes[0].stages == stages
    floats = replace(space, precisions=dict.fromkeys(space.precisions, ("fp32",)))
    left = with_stages_that_pay(floats)
    assert left.recipes[0].stages == stages[:1]
    assert "stage 'bits' of recipe 'p'" in left.dropped

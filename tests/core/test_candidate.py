import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core.candidate import Candidate, LayerChoice, Sparsity, parse_precision, parse_sparsity
from autocompress.core.errors import InputError
from autocompress.core.recipe import Quantize, Recipe, Stage
from autocompress.core.record import from_json, to_json
from tests.core.strategies import CANDIDATES, LAYER_CHOICES, NAMES


@given(CANDIDATES)
def test_canonical_text_is_json_that_gives_the_candidate_back(candidate: Candidate) -> None:
    again = from_json(Candidate, json.loads(candidate.canonical))
    assert again == candidate
    assert again.canonical == candidate.canonical
    assert again.digest == candidate.digest


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_order_and_layers_that_choose_nothing_do_not_change_the_digest(candidate: Candidate, rng: Any) -> None:
    widths, layers = list(candidate.widths.items()), [*candidate.layers.items(), ("nothing", LayerChoice())]
    rng.shuffle(widths)
    rng.shuffle(layers)
    assert replace(candidate, widths=dict(widths), layers=dict(layers)).digest == candidate.digest


@given(CANDIDATES, CANDIDATES)
def test_digests_are_equal_exactly_for_equal_candidates(one: Candidate, other: Candidate) -> None:
    assert (one.digest == other.digest) == (one == other)


@given(CANDIDATES, NAMES, LAYER_CHOICES)
def test_float_weights_do_not_depend_on_bits_nor_calibrator(
    candidate: Candidate, name: str, choice: LayerChoice
) -> None:
    dense = replace(choice, sparsity=None, rank=None)
    layers = {k: v for k, v in candidate.layers.items() if k != name}
    plain = replace(candidate, layers=layers, recipe=Recipe(recover_steps=9))
    other = replace(plain, layers={**layers, name: dense}, recipe=replace(plain.recipe, calibrator="percentile"))
    assert other.weights_key == plain.weights_key


def test_float_weights_depend_on_bits_where_the_recipe_looks_at_them() -> None:
    recipe = Recipe(stages=(Stage(name="q", quantize=Quantize(equalize=True)),))
    four, eight = (Candidate(layers={"a": LayerChoice(weight_bits=b)}, recipe=recipe) for b in (4, 8))
    assert four.weights_key != eight.weights_key


@pytest.mark.parametrize(
    "change",
    [
        {"student": 0.5},
        {"widths": {"conv": 8}},
        {"layers": {"conv": LayerChoice(sparsity=Sparsity(ratio=0.5))}},
        {"recipe": Recipe(recover_steps=1)},
    ],
)
def test_float_weights_depend_on_topology_sparsity_and_recovery(change: dict[str, Any]) -> None:
    assert Candidate(**change).weights_key != Candidate().weights_key


def _key(**choice: Any) -> str:
    return Candidate(layers={"conv": LayerChoice(**choice)}).kernel_key


def test_equal_kernels_are_those_of_equal_topology_and_class_of_arithmetic() -> None:
    sparse = Sparsity(ratio=0.5)
    assert _key(weight_bits=8, activation_bits=8) == _key(weight_bits=4, activation_bits=8, sparsity=sparse)
    assert _key(weight_bits=4) == _key(weight_bits=16, sparsity=sparse) == Candidate().kernel_key
    assert _key(weight_bits=8, activation_bits=8) != Candidate().kernel_key
    assert Candidate(recipe=Recipe(calibrator="mse", recover_steps=9)).kernel_key == Candidate().kernel_key
    assert Candidate(widths={"conv": 8}).kernel_key != Candidate().kernel_key
    assert Candidate(student=0.5).kernel_key != Candidate().kernel_key


def test_the_pattern_that_kernels_skip_is_another_kernel_and_other_weights() -> None:
    dense, zeros = Candidate(), Sparsity(ratio=0.5)
    pattern = Sparsity(ratio=0.5, pattern="2:4")
    assert _key(sparsity=zeros) == dense.kernel_key != _key(sparsity=pattern)
    assert _key(weight_bits=8, activation_bits=8) != _key(weight_bits=8, activation_bits=8, sparsity=pattern)
    keys = {Candidate(layers={"conv": LayerChoice(sparsity=s)}).weights_key for s in (None, zeros, pattern)}
    assert len(keys) == 3


@given(LAYER_CHOICES)
def test_sparsity_is_read_back_from_its_name(choice: LayerChoice) -> None:
    assert parse_sparsity(choice.sparsity.name if choice.sparsity else 0.0) == choice.sparsity


@given(LAYER_CHOICES)
def test_precision_is_read_back_from_its_name(choice: LayerChoice) -> None:
    assert parse_precision(choice.precision) == replace(choice, sparsity=None, rank=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity(ratio=1.2), r"`sparsity` must be in \(0, 1\), got 1.2"),
        (lambda: Sparsity(ratio=0.25, pattern="2:4"), "`sparsity` of pattern 2:4 is 0.5, got 0.25"),
        (lambda: parse_sparsity("3:4"), r"`sparsities` must be 2:4, .* or in \[0, 1\), got '3:4'"),
        (lambda: LayerChoice(weight_bits=9), "`weight_bits` must be one of .*, got 9"),
        (lambda: LayerChoice(activation_bits=16), r"`activation_bits` must be one of .*, got 16"),
        (lambda: LayerChoice(weight_bits=16, activation_bits=8), "w16a8: quantized activations need quantized weights"),
        (lambda: Recipe(recover_steps=-1), "`recover_steps` must be at least 0, got -1"),
        (lambda: Candidate(student=0.0), "`student` must be a positive width, got 0.0"),
        (lambda: Candidate(student=float("nan")), "`student` must be a positive width, got nan"),
        (lambda: Candidate(widths={"conv": 0}), "the width of 'conv' must be at least 1, got 0"),
        (lambda: parse_precision("int8"), "a precision is 'fp32' or like 'w8a8' .*, got 'int8'"),
        (lambda: parse_precision("w8a8 "), "a precision is 'fp32' or like 'w8a8' .*, got 'w8a8 '"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_json_form_is_fixed() -> None:
    candidate = Candidate(widths={"b": 8, "a": 16}, layers={"fc": LayerChoice(weight_bits=8, activation_bits=8)})
    assert to_json(candidate) == {
        "student": None,
        "widths": {"a": 16, "b": 8},
        "layers": {"fc": {"weight_bits": 8, "activation_bits": 8, "dynamic": False, "sparsity": None}},
        "float_precision": "fp32",
        "recipe": {"calibrator": "minmax", "recover_steps": 0},
    }
    assert candidate.digest == "0c56e7372d8ee00b3a13707cb04a2538cf5b615eac57b66a93351a4b04070818"

"""Probes of one choice at a time: what they say of networks whose sensitive parts are known."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.compress.apply import Setting
from autocompress.compress.effects import NO_TIME, anchors, between
from autocompress.compress.layers import describe
from autocompress.compress.multiply_adds import multiply_adds
from autocompress.compress.outputs import outputs_of
from autocompress.compress.qat import Aware
from autocompress.compress.rounded import Rounded, round_weight
from autocompress.compress.sensitivity import measure
from autocompress.core.candidate import parse_precision
from autocompress.core.profile import Profile
from autocompress.core.sensitivity import Effect, Sensitivity
from autocompress.core.space import LayerRule, Space, SpaceRules, WidthRule
from tests import nets
from tests.compress import materials
from tests.compress.conftest import Described, same, state_of

Get = Callable[[str], Described]
EVERY = ("fp32", "w8a8", "w4a8", "k4a8", "w8d8", "w4a32", "w16a32")
PROFILE = Profile(
    name="p",
    description="",
    runtime="onnxruntime",
    format="onnx",
    precisions=dict.fromkeys(("conv1d", "conv2d", "linear", "embedding"), EVERY),
    width_multiple=1,
    sparse_kernels=True,
)
RULES = SpaceRules(
    name="all",
    description="",
    layers=(
        LayerRule(precisions=EVERY, sparsities=(0.0, 0.5, 0.9, "2:4"), ranks=(1.0, 0.5)),
        LayerRule(kind=("embedding",), precisions=("fp32", "w4a32"), sparsities=(0.0,)),
    ),
    widths=(WidthRule(ratios=(1.0, 0.75, 0.5, 0.25)),),
    heads=(1.0, 0.5),
    skip=("*",),
    calibrators=("minmax", "mse"),
    students=(0.5,),
)


def probed(case: Described, rules: SpaceRules = RULES, **more: Any) -> Sensitivity:
    return measure(space_of(case, rules), setting_of(case), task="t", target="p", **more)


def setting_of(case: Described) -> Setting:
    material = materials.of_case(case, classifies=True)
    return Setting(original=case.net, anatomy=case.anatomy, material=material, reference=lambda: 0.0)


def space_of(case: Described, rules: SpaceRules = RULES) -> Space:
    return rules.resolve(case.structure, PROFILE, has_student=True)


def case_of(net: nn.Module, inputs: Callable[..., Mapping[str, Tensor]] = nets.rows) -> Described:
    structure, anatomy = describe(net, lambda model: nets.positional(model, inputs()))
    return Described(net=net, inputs=inputs, call=nets.positional, structure=structure, anatomy=anatomy)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(nets.CASES))
def test_every_variable_has_effects_or_a_reason(described: Get, name: str) -> None:
    """Depthwise and grouped convolutions, Conv1d with a tuple of inputs, embeddings with a dict of them."""
    case = described(name)
    before, space = state_of(case.net), space_of(case)
    found = probed(case, int8_ratio=0.5)
    assert same(before, case.net.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.net.modules())
    assert set(found.effects) | {key.partition("=")[0] for key in found.left_out} >= set(space.variables)
    assert {v for v in space.variables if v not in found.effects} == {"student", "calibrator"}
    for variable, table in found.effects.items():
        choices = [str(c) for c in space.variables[variable]]
        assert list(table) == [c for c in choices if c in table]
        missing = {f"{variable}={c}" for c in choices if c not in table and c != "block"}
        assert missing == {key for key in found.left_out if key.startswith(f"{variable}=")}
    assert found.probes <= sum(len(choices) for choices in space.variables.values())


def test_probing_twice_gives_the_same(described: Get) -> None:
    one, other = (probed(described("residual")) for _ in range(2))
    assert (one.effects, one.left_out, one.probes) == (other.effects, other.left_out, other.probes)


def test_fewer_bits_of_a_layer_lose_more(described: Get) -> None:
    effects = probed(described("separable")).effects
    for table in (t for name, t in effects.items() if name.startswith("layer:")):
        assert table["fp32"] == Effect(loss=0.0, cost=0.0, probed=False)
        assert table["w16a32"].loss < table["w8a8"].loss < table["w4a8"].loss
        assert table["w4a32"].loss < 2 * table["w4a8"].loss


def test_a_block_is_the_sum_of_its_layers(described: Get) -> None:
    case = described("separable")
    found, members = probed(case, int8_ratio=0.5).effects, space_of(case).members
    for block, layers in members.items():
        if f"layer:{layers[0]}" in found:
            whole = found[f"precision:{block}"]["w4a8"]
            assert whole.loss == pytest.approx(sum(found[f"layer:{n}"]["w4a8"].loss for n in layers))
            assert not whole.probed


def deaf(scale: float) -> nn.Module:
    """Four linear layers. The third has one weight per row that is so large that the others round away at 4 bits."""
    net = nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)], nn.Linear(12, 4))
    with torch.no_grad():
        net[2].weight[:, 0] *= scale
        net[1].weight[0] /= scale
        net[1].bias[0] /= scale
    return net.eval().requires_grad_(False)


def test_the_layer_made_sensitive_on_purpose_is_ranked_first() -> None:
    """Its channel is scaled back before it, so that in float the network computes what it would without."""
    rules = SpaceRules(name="bits", description="", layers=(LayerRule(precisions=("fp32", "w4a32")),))
    plain, spoilt = (probed(case_of(nets.seeded(lambda s=s: deaf(s))), rules) for s in (1.0, 30.0))
    assert spoilt.ranked()[0] == "precision:2"
    losses = {name: table["w4a32"].loss for name, table in spoilt.effects.items()}
    assert losses["precision:2"] > 5 * max(loss for name, loss in losses.items() if name != "precision:2")
    assert losses["precision:2"] > 5 * plain.effects["precision:2"]["w4a32"].loss


def half_idle() -> nn.Module:
    """Two hidden layers: of the first, half the channels are read by nobody."""
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[8:] *= 1e-3
        net[2].weight[:, 8:] *= 1e-3
    return net.eval().requires_grad_(False)


def test_idle_channels_are_free_to_cut() -> None:
    rules = SpaceRules(name="widths", description="", widths=(WidthRule(ratios=(1.0, 0.5)),))
    effects = probed(case_of(nets.seeded(half_idle)), rules).effects
    assert effects["width:0"]["8"].loss < 1e-3 * effects["width:2"]["8"].loss
    assert effects["width:0"]["8"].cost == pytest.approx(-(8 * 12 + 8 * 16) / (12 * 16 + 16 * 16 + 16 * 4))


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "k4a8", "w4a32"])
@pytest.mark.parametrize(
    ("name", "dialect"), [("separable", "uint8"), ("separable", "int8"), ("branches", "uint8"), ("encoder", "uint8")]
)
def test_a_rounded_layer_computes_what_training_for_its_bits_simulates(
    described: Get, name: str, dialect: Any, precision: str
) -> None:
    """The same weights, ranges and absorbed BatchNorm; the rest of the model is left as it is."""
    case = described(name)
    material = materials.of_case(case)
    batches = [batch for batch, _ in material.calibration(128, 32)]
    layer = case.structure.layers[-2].name
    choice = {layer: parse_precision(precision)}
    rounded = Rounded(case.net, [layer], case.call, batches, dialect)
    model = nets.seeded(nets.CASES[name][0])
    Aware(model, choice, material, dialect=dialect)
    with torch.no_grad():
        plain = outputs_of(case.call(rounded.model, batches[0]))
        with rounded.at(choice) as found:
            got = outputs_of(case.call(found, batches[0]))
        again = outputs_of(case.call(rounded.model, batches[0]))
        wanted = outputs_of(case.call(model.eval(), batches[0]))
    for p, a, g, w in zip(plain, again, got, wanted, strict=True):
        assert torch.equal(p, a)
        assert float((g - w).abs().max()) < 0.02 * float((p - w).abs().max()) + 1e-5


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounded_weights_have_no_more_values_than_bits_allow(bits: int) -> None:
    weight = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    rounded = round_weight(weight, parse_precision(f"w{bits}a32"))
    assert rounded.dtype == torch.float32
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    assert float((rounded - weight).norm() / weight.norm()) < 1.5 / (2 ** (bits - 1) - 1)


class Fragile(nn.Module):
    """Raises where `broken` has other weights than it was made with, or fewer channels come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.broken, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.sum = float(self.broken.weight.detach().sum())

    def forward(self, x: Tensor) -> Tensor:
        if abs(float(self.broken.weight.detach().sum()) - self.sum) > 1e-6:
            raise RuntimeError("these weights are\nnot mine")
        return self.last(self.broken(self.first(x)))


def test_what_a_users_layer_raises_is_a_reason_and_no_end() -> None:
    rules = SpaceRules(name="bits", description="", layers=(LayerRule(precisions=("fp32", "w4a32")),))
    case = case_of(nets.seeded(Fragile))
    found = probed(case, rules)
    assert found.left_out == {"precision:broken": "RuntimeError: these weights are"}
    assert set(found.effects) == {"precision:first", "precision:last"}


def test_a_model_that_does_not_run_leaves_everything_out() -> None:
    case = case_of(nets.seeded(Fragile))
    case.net.sum = 1e9  # type: ignore[assignment]
    found = probed(case)
    assert found.effects == {}
    assert set(found.left_out) == set(space_of(case).variables)
    assert "RuntimeError: these weights are" in found.left_out["precision:last"]


def test_outputs_that_are_not_finite_are_a_reason(described: Get) -> None:
    case = described("flat")
    material = replace(materials.of_case(case), call=lambda net, batch: case.call(net, batch) / 0)
    setting = Setting(original=case.net, anatomy=case.anatomy, material=material, reference=lambda: 0.0)
    found = measure(space_of(case), setting, task="t", target="p")
    assert found.effects == {}
    assert "diverge by nan" in found.left_out["precision:fc"]


def test_what_there_is_no_time_for_is_left_out_by_name(described: Get) -> None:
    found = probed(described("residual"), seconds=0.0)
    assert (found.effects, found.probes) == ({}, 0)
    assert set(found.left_out) == set(space_of(described("residual")).variables)
    assert found.left_out["width:conv1"] == NO_TIME


@pytest.mark.parametrize(("ratio", "relative"), [(0.6, -0.4), (1.2, 0.2), (None, -0.75)])
def test_integer_layers_cost_the_measured_ratio_or_their_bits(
    described: Get, ratio: float | None, relative: float
) -> None:
    case = described("residual")
    rules = SpaceRules(name="b", description="", precision_by="model", layers=(LayerRule(precisions=EVERY),))
    effects = probed(case, rules, int8_ratio=ratio).effects["precision:all"]
    assert effects["w8a8"].cost == pytest.approx(relative)
    assert effects["w4a32"].cost == effects["w16a32"].cost == 0.0
    assert effects["w8a8"].probed


def test_leaving_out_a_block_saves_its_arithmetic_and_an_embedding_has_none(described: Get) -> None:
    tokens = probed(described("encoder")).effects["precision:tokens"]["w4a32"]
    assert tokens.loss > 0
    assert tokens.cost == 0.0
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(12, 12), Residual(), nn.Linear(12, 4)))
    effects = probed(case_of(net)).effects
    arithmetic = multiply_adds(net, lambda model: model(nets.rows(1)["input"]))
    inside = arithmetic["1.up"] + arithmetic["1.down"]
    assert effects["skip:1"]["1"].cost == pytest.approx(-inside / sum(arithmetic.values()))
    assert effects["skip:1"]["1"].loss > 0


class Residual(nn.Module):
    """A block that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Attentive(nn.Module):
    """torch's own attention, whose arithmetic runs in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, x.flip(1), x * 2], 1)
        return self.fc(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


def test_fewer_heads_save_and_cost() -> None:
    effects = probed(case_of(nets.seeded(Attentive))).effects["heads:attention"]
    assert effects["2"].loss > 0
    assert -0.6 < effects["2"].cost < -0.3


def test_a_depthwise_group_is_cut_with_the_layers_around_it(described: Get) -> None:
    """Of stem, depthwise and pointwise layers at a quarter of the width a quarter of the arithmetic is left."""
    case = described("separable")
    effects = probed(case).effects["width:depthwise.0"]
    arithmetic = multiply_adds(case.net, lambda model: case.call(model, case.inputs(1)))
    touched = sum(arithmetic[name] for name in ("stem.0", "depthwise.0", "pointwise.0"))
    assert effects["4"].cost == pytest.approx(-0.75 * touched / sum(arithmetic.values()))
    assert [effects[c].probed for c in ("16", "12", "8", "4")] == [False, False, True, True]
    assert effects["12"].loss <= effects["8"].loss <= effects["4"].loss


LINES = st.lists(st.floats(0.01, 100), min_size=1, max_size=7, unique=True)


@given(LINES)
def test_anchors_are_the_farthest_and_a_middle_one(places: list[float]) -> None:
    distances = {str(i): far for i, far in enumerate([0.0, *places])}
    found = anchors(distances)
    assert distances[str(found[-1])] == max(places)
    assert len(found) == min(2, len(places))
    assert all(distances[str(c)] > 0 for c in found)


@given(LINES, st.data())
def test_losses_between_probes_never_fall_on_the_way(places: list[float], data: st.DataObject) -> None:
    distances: dict[Any, float] = dict(enumerate([0.0, *places]))
    known: dict[Any, Effect] = {0: Effect(loss=0.0, cost=0.0)}
    known |= {c: Effect(loss=data.draw(st.floats(0, 5)), cost=-0.1 * c) for c in anchors(distances)}  # type: ignore[operator]
    found = between(known, distances)
    assert set(found) == set(distances)
    losses = [found[c].loss for c in sorted(distances, key=lambda c: distances[c])]
    assert all(a <= b + 1e-9 for a, b in pairwise(losses))
    assert all(found[c].loss >= known[c].loss for c in known)


def test_nothing_is_said_beyond_the_last_probe() -> None:
    known: dict[Any, Effect] = {8: Effect(loss=0.0, cost=0.0), 6: Effect(loss=0.1, cost=-0.1)}
    assert set(between(known, {8: 0.0, 6: 2.0, 4: 4.0})) == {8, 6}

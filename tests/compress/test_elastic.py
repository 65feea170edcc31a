"""Properties of elastic recovery: slices of shared weights, and what training them gives."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.build import Builder, Stopwatch
from autocompress.compress.elastic import Subnets, train_elastic
from autocompress.compress.outputs import outputs_of
from autocompress.compress.settle import settle_batchnorm
from autocompress.compress.width import ChannelGroup, cut_widths
from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError, StageError
from autocompress.core.recipe import Prune, Recipe, Stage, Train
from tests import tiny
from tests.compress import materials
from tests.compress.conftest import Described, same, state_of
from tests.nets import CASES

Get = Callable[[str], Described]


def choices(group: ChannelGroup) -> tuple[int, ...]:
    """All of a group's channels, about half, and one from each part."""
    half = group.partitions * max(1, group.width // group.partitions // 2)
    return tuple(sorted({group.width, half, group.partitions}, reverse=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [1, -1])
def test_a_slice_gives_what_the_cut_model_gives(described: Get, name: str, place: int) -> None:
    """Depthwise, grouped, residual, concatenated, one-dimensional, Linear and LayerNorm: whatever can be cut."""
    case = described(name)
    offered = {g.name: choices(g) for g in case.groups}
    if not offered:
        pytest.skip(f"nothing of {name} can be cut")
    net = copy.deepcopy(case.net)
    subnets = Subnets(net, case.groups, offered)
    before = {path: dict(vars(module)) for path, module in net.named_modules()}
    widths = {group: widths[place] for group, widths in offered.items()}
    batch = case.inputs()
    got = outputs_of(case.call(subnets.network(widths).eval(), batch))
    wanted = outputs_of(case.call(cut_widths(case.net, case.groups, widths), batch))
    assert all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, wanted, strict=True))
    assert {path: dict(vars(module)) for path, module in net.named_modules()} == before
    assert same(net.state_dict(), case.net.state_dict())


def test_gradients_land_in_the_slice_and_nowhere_else(described: Get) -> None:
    case = described("residual")
    net = copy.deepcopy(case.net).requires_grad_(True)
    subnets = Subnets(net, case.groups, {"conv1": (24, 8)})
    out = case.call(subnets.network({"conv1": 8}).eval(), case.inputs())
    out.square().sum().backward()
    group = next(g for g in case.groups if g.name == "conv1")
    gone = sorted(group.removed(8))
    kept = [i for i in range(24) if i not in gone]
    gradient = net.conv1.weight.grad
    assert (gradient[gone] == 0).all()
    assert (gradient[kept].flatten(1).abs().sum(1) > 0).sum() >= len(kept) / 2  # some are silent on the sample
    assert (net.conv2.weight.grad[:, gone] == 0).all()
    assert net.fc.weight.grad.abs().sum() > 0


def classified(described: Get) -> tuple[Described, materials.Material]:
    case = described("residual")
    return case, materials.of_case(case, classifies=True)


def divergence(case: Described, model: nn.Module) -> float:
    """Squared error of the outputs to the original's, on items nothing was trained on."""
    batch = case.inputs(256, seed=9999)
    with torch.no_grad():
        (got,), (wanted,) = outputs_of(case.call(model.eval(), batch)), outputs_of(case.call(case.net, batch))
    return float((got - wanted).square().mean())


def settled(case: Described, material: materials.Material, model: nn.Module, widths: dict[str, int]) -> nn.Module:
    narrow = cut_widths(model, case.groups, widths)
    settle_batchnorm(narrow, case.call, [batch for batch, _ in material.calibration(128, 32)])
    return narrow


def test_narrow_networks_inherit_what_was_learned(described: Get) -> None:
    case, material = classified(described)
    offered = {g.name: choices(g)[:2] for g in case.groups}
    narrowest = {name: widths[-1] for name, widths in offered.items()}
    before = state_of(case.net)
    shared = train_elastic(case.net, case.groups, offered, material, Train(), steps=60, seed=0)
    assert same(case.net.state_dict(), before)
    plain = divergence(case, settled(case, material, case.net, narrowest))
    assert divergence(case, settled(case, material, shared, narrowest)) < 0.8 * plain
    again = train_elastic(case.net, case.groups, offered, material, Train(), steps=60, seed=0)
    assert same(shared.state_dict(), again.state_dict())
    assert not any(p.requires_grad for p in shared.parameters())
    assert all(torch.equal(b, dict(case.net.named_buffers())[n]) for n, b in shared.named_buffers())


def test_a_training_that_diverges_says_so(described: Get) -> None:
    case, material = classified(described)
    offered = {g.name: choices(g) for g in case.groups}
    how = Train(optimizer="sgd", learning_rate=1e30)
    with pytest.raises(StageError, match="lower `learning_rate`"):
        train_elastic(case.net, case.groups, offered, material, how, steps=20, seed=0)


def test_steps_cannot_be_negative() -> None:
    with pytest.raises(InputError, match="`inherit` must be at least 0 steps, got -1"):
        Prune(inherit=-1)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(name="elastic", stages=(Stage(name="recover", prune=Prune(inherit=6), train=Train(batch_size=8)),))


def test_candidates_of_a_run_share_one_training(recipe: Recipe, tmp_path: Path) -> None:
    """The second candidate, and another process of the run, read what the first one trained."""
    told: list[str] = []
    task = tiny.task()

    def builder() -> Builder:
        return Builder(task, tmp_path, tiny.PROFILE, lambda what, *_: told.append(what))

    (tmp_path / "artifacts").mkdir()
    group = builder().structure.groups[0]
    one = Candidate(widths={group.name: group.width // 2}, recipe=recipe)
    two = Candidate(widths={group.name: group.width // 4 or 1}, recipe=recipe)
    first = builder()
    watch = Stopwatch()
    made = first.build(one, watch).artifact
    assert watch.seconds["share"] > 0
    assert told == ["share"] * 6
    first.build(two, Stopwatch())
    second = builder()
    assert second.build(one, Stopwatch()).artifact.sha256 == made.sha256
    assert told == ["share"] * 6
    plain = replace(one, recipe=Recipe())
    assert second.build(plain, Stopwatch()).artifact.sha256 != made.sha256


def test_what_keeps_its_widths_keeps_its_weights(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    builder = Builder(tiny.task(), tmp_path, tiny.PROFILE)
    watch = Stopwatch()
    whole = builder.build(Candidate(recipe=recipe), watch).artifact
    assert "share" not in watch.seconds
    assert whole.sha256 == builder.build(Candidate(), Stopwatch()).artifact.sha256


def test_weights_that_other_widths_shared_are_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    """A run begun with the weights of another space's finds those of its own widths only."""
    told: list[str] = []
    task = tiny.task()
    (tmp_path / "artifacts").mkdir()

    def build(*shares: float) -> str:
        builder = Builder(task, tmp_path, tiny.PROFILE, lambda what, *_: told.append(what))
        group = builder.structure.groups[0]
        widths = [max(1, round(group.width * share)) for share in shares]
        builder.allow({group.name: widths})
        candidate = Candidate(widths={group.name: widths[1]}, recipe=replace(recipe, recover_steps=2))
        return builder.build(candidate, Stopwatch()).artifact.sha256

    narrow = build(1.0, 0.5)
    count = len(told)
    assert build(1.0, 0.5) == narrow
    assert len(told) == count
    assert build(1.0, 0.5, 0.25) != narrow
    assert told[count:].count("share") == 6

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import kept
from autocompress.compress.apply import Compressed, Setting, apply
from autocompress.compress.cut import cut
from autocompress.compress.layers import describe
from autocompress.compress.material import Material
from autocompress.core.candidate import Candidate, LayerChoice, Sparsity, parse_precision
from autocompress.core.errors import StageError
from autocompress.core.recipe import Distill, Prune, Quantize, Recipe, Stage, Train
from autocompress.tasks import digits
from tests import nets
from tests.compress.conftest import Described, same, state_of
from tests.nets import CASES

Get = Callable[[str], Described]


def material(case: Described, **more: Any) -> Material:
    """Items drawn by seed; a second batch of them is for calibration. Nothing has labels unless `more` says so."""
    given = {
        "classifies": False,
        "loss": None,
        "items": 512,
        "fetch": lambda rows: (case.inputs(len(rows), seed=int(rows[0]) + 100), None),
        "fixed": False,
        "calibration": lambda items, size: ((case.inputs(size, seed=7 + i), None) for i in range(0, items, size)),
        "validate": lambda _: 0.0,
    }
    return Material(call=case.call, **{**given, **more})


def setting(case: Described, student: Any = None, **more: Any) -> Setting:
    anatomy = replace(case.anatomy, student=student)
    stuff = material(case, **more)
    return Setting(original=case.net, anatomy=anatomy, material=stuff, reference=lambda: stuff.validate(case.net))


def applied(case: Described, candidate: Candidate, **more: Any) -> nn.Module:
    return apply(candidate, setting(case, **more)).model


def halves(case: Described) -> dict[str, int]:
    return {g.name: g.partitions * (g.width // g.partitions // 2) for g in case.anatomy.groups}


def sparse(ratio: float, *names: str) -> dict[str, LayerChoice]:
    return {name: LayerChoice(sparsity=Sparsity(ratio=ratio)) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_the_original_stays_as_it_was_to_the_bit(described: Get, name: str) -> None:
    case = described(name)
    before = state_of(case.net)
    layers = sparse(0.5, *(layer.name for layer in case.structure.layers))
    candidate = Candidate(widths=halves(case), layers=layers, recipe=Recipe(recover_steps=2))
    made = applied(case, candidate)
    assert same(case.net.state_dict(), before)
    assert not case.net.training
    assert all(not p.requires_grad and p.grad is None for p in case.net.parameters())
    theirs = {p.data_ptr() for p in case.net.parameters()}
    assert not any(p.data_ptr() in theirs for p in made.parameters())


def test_a_compressed_model_is_in_eval_mode_and_needs_no_gradient(described: Get) -> None:
    case = described("residual")
    made = applied(case, Candidate(widths=halves(case), recipe=Recipe(recover_steps=1)))
    assert not any(module.training for module in made.modules())
    assert not case.call(made, case.inputs()).requires_grad


def test_zeros_hold_through_recovery(described: Get) -> None:
    case = described("residual")
    candidate = Candidate(widths=halves(case), layers=sparse(0.5, "conv1", "fc"), recipe=Recipe(recover_steps=8))
    made = applied(case, candidate)
    plain = applied(case, Candidate(widths=halves(case), layers=candidate.layers))
    for name in ("conv1", "fc"):
        after, before = (net.get_submodule(name).get_parameter("weight") for net in (made, plain))
        assert int((after == 0).sum()) == int(0.5 * after.numel())
        assert torch.equal(after == 0, before == 0)
        assert not torch.equal(after, before)


@pytest.fixture(scope="module")
def trained() -> tuple[Described, Tensor, Tensor]:
    """The digits network, and images and labels it was not trained on."""
    net = digits.model().requires_grad_(False)
    parts = digits.split()
    images = parts["train"].tensors[0]

    def inputs(size: int = 2, seed: int = 0) -> dict[str, Tensor]:
        rows = torch.randint(0, len(images), (size,), generator=torch.Generator().manual_seed(seed))
        return {"image": images[rows]}

    structure, anatomy = describe(net, lambda model: nets.positional(model, inputs()))
    case = Described(net=net, inputs=inputs, call=nets.positional, structure=structure, anatomy=anatomy)
    return case, *parts["validation"].tensors


def share(chosen: Tensor, wanted: Tensor) -> float:
    return float((chosen == wanted).float().mean())


def test_settling_after_a_cut_wins_back_accuracy(trained: tuple[Described, Tensor, Tensor]) -> None:
    case, images, labels = trained
    widths = halves(case)
    raw = cut(case.net, case.anatomy, Candidate(widths=widths), before=Candidate())
    with torch.no_grad():
        unsettled = share(raw(images).argmax(1), labels)
        settled = share(applied(case, Candidate(widths=widths))(images).argmax(1), labels)
    assert settled > unsettled + 0.1


def test_settling_after_zeros_wins_back_accuracy(trained: tuple[Described, Tensor, Tensor]) -> None:
    case, images, labels = trained
    made = applied(case, Candidate(layers=sparse(0.7, *(layer.name for layer in case.structure.layers))))
    unsettled = copy.deepcopy(case.net)
    unsettled.load_state_dict({n: p for n, p in made.state_dict().items() if "running" not in n}, strict=False)
    with torch.no_grad():
        lost = share(unsettled(images).argmax(1), labels)
        assert share(made(images).argmax(1), labels) > lost + 0.1


def test_a_cut_whose_layers_are_fitted_answers_better_and_keeps_the_statistics(
    trained: tuple[Described, Tensor, Tensor],
) -> None:
    case, images, labels = trained
    fitting = Recipe(stages=(Stage(name="cut", prune=Prune(reconstruct=True)),))
    settled, fitted = (applied(case, Candidate(widths=halves(case), recipe=r)) for r in (Recipe(), fitting))
    with torch.no_grad():
        assert share(fitted(images).argmax(1), labels) > share(settled(images).argmax(1), labels) + 0.05
    order = case.anatomy.groups[0]
    kept = sorted(set(range(order.width)) - order.removed(halves(case)[order.name]))
    norm = next(c.module for c in order.cuts if isinstance(case.net.get_submodule(c.module), nn.BatchNorm2d))
    before, after = (net.get_submodule(norm).running_mean for net in (case.net, fitted))
    assert torch.equal(after, before[kept])


def test_recovery_agrees_more_with_the_original_than_the_same_cut_without(
    trained: tuple[Described, Tensor, Tensor],
) -> None:
    case, images, _ = trained
    widths = halves(case)
    plain = applied(case, Candidate(widths=widths))
    recovered = applied(case, Candidate(widths=widths, recipe=Recipe(recover_steps=30)))
    wanted = case.net(images).argmax(1)
    assert share(recovered(images).argmax(1), wanted) > share(plain(images).argmax(1), wanted) + 0.1
    assert [p.shape for p in recovered.parameters()] == [p.shape for p in plain.parameters()]


def test_a_student_takes_the_place_of_the_cut_model(described: Get) -> None:
    case = described("perceptron")

    def student(width: float) -> nn.Module:
        return nets.seeded(
            lambda: nn.Sequential(nn.Linear(12, int(32 * width)), nn.ReLU(), nn.Linear(int(32 * width), 4))
        )

    made = applied(case, Candidate(student=0.5), student=student)
    assert made[0].out_features == 16
    torch.testing.assert_close(made(case.inputs()["input"]), student(0.5)(case.inputs()["input"]))


def test_a_student_that_its_task_keeps_is_not_changed(described: Get) -> None:
    case = described("perceptron")
    kept = nets.seeded(nets.perceptron, seed=3)
    before = state_of(kept)
    candidate = Candidate(student=0.5, layers=sparse(0.5, "0"), recipe=Recipe(recover_steps=2))
    made = applied(case, candidate, student=lambda _: kept)
    assert same(kept.state_dict(), before)
    assert int((made[0].weight == 0).sum()) == made[0].weight.numel() // 2


def test_a_student_that_the_task_does_not_have_is_refused(described: Get) -> None:
    with pytest.raises(StageError, match=r"the candidate wants a student of width 0\.5, the task has none"):
        applied(described("perceptron"), Candidate(student=0.5))


def plan(*stages: Stage, steps: int = 0) -> Recipe:
    return Recipe(recover_steps=steps, stages=stages)


def scored(*figures: float) -> Callable[[nn.Module], float]:
    """A metric that gives these figures in turn."""
    left = list(figures)
    return lambda _: left.pop(0)


SHRINK = Stage(name="shrink", prune=Prune(), cycles=4, gate=5.0)


def test_cycles_cut_further_each_time_and_end_at_the_candidate(described: Get) -> None:
    case = described("residual")
    seen: list[int] = []

    def watched(net: nn.Module) -> float:
        seen.append(sum(p.numel() for p in net.parameters()))
        return 0.9

    whole = apply(Candidate(widths=halves(case), recipe=plan(SHRINK)), setting(case, validate=watched))
    at_once = applied(case, Candidate(widths=halves(case)))
    sizes = [size for size in seen if size != sum(p.numel() for p in case.net.parameters())]
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) == 4
    assert same(whole.model.state_dict(), at_once.state_dict())
    assert (whole.done.widths, whole.notes) == (halves(case), ())


def test_a_cycle_that_fails_its_gate_is_undone_and_named_with_figure_and_limit(described: Get) -> None:
    case = described("residual")
    # The original, then cycle by cycle: 0.9 is the reference each time.
    figures = scored(0.9, 0.89, 0.9, 0.88, 0.9, 0.8)
    candidate = Candidate(widths=halves(case), layers=sparse(0.5, "fc"), recipe=plan(SHRINK))
    made = apply(candidate, setting(case, validate=figures))
    assert made.notes == ("stage 'shrink', cycle 3 of 4 was undone: it lost 10.00 points, the limit is 5",)
    full = {g.name: g.width for g in case.anatomy.groups}
    assert {n: (full[n] - w) / (full[n] - halves(case)[n]) for n, w in made.done.widths.items()} == pytest.approx(
        dict.fromkeys(full, 0.5)
    )
    assert made.done.layers["fc"].sparsity == Sparsity(ratio=0.25)
    again = cut(case.net, case.anatomy, made.done, before=Candidate())
    assert [p.shape for p in again.parameters()] == [p.shape for p in made.model.parameters()]


def test_a_stage_that_prepares_for_bits_leaves_what_was_before_to_fall_back_on(described: Get) -> None:
    case = described("residual")
    stages = (Stage(name="cut", prune=Prune()), Stage(name="bits", quantize=Quantize(equalize=True), gate=1.0))
    layers = {"conv1": parse_precision("w4a8")}
    candidate = Candidate(widths=halves(case), layers=layers, recipe=plan(*stages))
    made = apply(candidate, setting(case, validate=scored(0.9, 0.9)))
    assert made.done.layers == layers
    assert made.fallback is not None
    assert (made.fallback.done.layers, made.fallback.done.widths) == ({}, halves(case))
    undone = apply(candidate, setting(case, validate=scored(0.9, 0.8)))
    assert undone.done.layers == {}
    assert undone.notes == ("stage 'bits' was undone: it lost 10.00 points, the limit is 1",)
    assert same(undone.model.state_dict(), made.fallback.model.state_dict())


def test_what_is_kept_on_disk_is_read_back_as_it_was(described: Get, tmp_path: Path) -> None:
    case = described("residual")
    stages = (Stage(name="cut", prune=Prune()), Stage(name="bits", quantize=Quantize(aware=True), train=Train()))
    layers = {"conv1": parse_precision("w4a8"), "fc": LayerChoice(sparsity=Sparsity(ratio=0.5))}
    candidate = Candidate(widths=halves(case), layers=layers, recipe=plan(*stages, steps=2))
    made = apply(candidate, setting(case))
    kept.write(tmp_path / "made.safetensors", made)
    read = kept.read(tmp_path / "made.safetensors", setting(case))
    assert same(read.model.state_dict(), made.model.state_dict())
    assert (read.done, read.notes, read.learned.inputs) == (made.done, made.notes, made.learned.inputs)
    assert {n: s.tolist() for n, s in read.learned.scales.items()} == {
        n: s.tolist() for n, s in made.learned.scales.items()
    }


@pytest.mark.parametrize("schedule", ["at-once", "gradual", "rewind"])
def test_all_schedules_end_with_the_share_of_zeros(described: Get, schedule: Any) -> None:
    case = described("residual")
    stage = Stage(name="recover", prune=Prune(schedule=schedule), train=Train())
    made = applied(case, Candidate(layers=sparse(0.75, "conv1"), recipe=plan(stage, steps=8)))
    assert int((made.conv1.weight == 0).sum()) == int(0.75 * made.conv1.weight.numel())


def test_a_copy_of_the_original_is_not_trained_to_be_a_copy(described: Get) -> None:
    case = described("residual")
    made = apply(Candidate(recipe=Recipe(recover_steps=5)), setting(case))
    assert same(made.model.state_dict(), case.net.state_dict())
    assert made.done.recipe.recover_steps == 0
    born_again = Stage(name="again", train=Train(distill=Distill(teachers="self")))
    assert not same(applied(case, Candidate(recipe=plan(born_again, steps=5))).state_dict(), case.net.state_dict())


def test_what_was_reached_tells_the_steps_that_were_taken(described: Get) -> None:
    """Not those asked for: assistants count, a training that ends early does not go on, an undone stage never was."""
    case = described("residual")

    def steps(*stages: Stage, **more: Any) -> int:
        candidate = Candidate(widths=halves(case), recipe=plan(*stages, steps=8))
        return apply(candidate, setting(case, **more)).done.recipe.recover_steps

    def cut(**how: Any) -> Stage:
        return Stage(name="cut", prune=Prune(), train=Train(**how))

    assert steps(cut()) == 8
    assert steps(cut(distill=Distill(assistants=(0.7,)))) == 8
    assert steps(cut(seconds=1e-9)) == 1
    undone = Stage(name="again", train=Train(share=0.5), gate=10.0)
    assert steps(cut(share=0.5), undone, validate=scored(1.0, 0.5)) == 4


def test_every_kind_of_cut_at_once(described: Get) -> None:
    """Widths, a rank, zeros and bits, with training that sees them."""
    case = described("residual")
    layers = {
        "conv2": LayerChoice(weight_bits=4, activation_bits=8, rank=2),
        "fc": LayerChoice(sparsity=Sparsity(ratio=0.5), weight_bits=8, activation_bits=8),
    }
    stages = (
        Stage(name="cut", prune=Prune(reconstruct=True, importance="activation"), train=Train(share=0.5)),
        Stage(name="bits", quantize=Quantize(aware=True, correct_bias=True), train=Train(share=0.5)),
    )
    made = apply(Candidate(widths=halves(case), layers=layers, recipe=plan(*stages, steps=4)), setting(case))
    assert isinstance(made, Compressed)
    assert set(made.learned.scales) == {"conv2.0", "conv2.1", "fc"}
    assert case.call(made.model, case.inputs()) is not None

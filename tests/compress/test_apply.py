import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.apply import apply, hold, settle_batchnorm, sparsity_masks
from autocompress.compress.layers import describe
from autocompress.compress.width import cut_widths
from autocompress.core.candidate import Candidate, LayerChoice, Sparsity
from autocompress.core.errors import StageError
from autocompress.core.recipe import Recipe
from autocompress.tasks import digits
from tests import nets
from tests.compress.conftest import Described, same, state_of
from tests.nets import CASES

Get = Callable[[str], Described]


def batches(case: Described, size: int = 32, seed: int = 100) -> Iterator[dict[str, Tensor]]:
    """Endless batches, the same for equal seeds."""
    while True:
        yield case.inputs(size, seed=seed)
        seed += 1


def settle(case: Described) -> list[dict[str, Tensor]]:
    return [case.inputs(64, seed=7), case.inputs(64, seed=8)]


def applied(case: Described, candidate: Candidate, **more: Any) -> nn.Module:
    return apply(
        candidate,
        case.net,
        case.groups,
        case.call,
        settle=lambda: settle(case),
        train=lambda: batches(case),
        **more,
    )


def halves(case: Described) -> dict[str, int]:
    return {g.name: g.partitions * (g.width // g.partitions // 2) for g in case.groups}


def sparse(ratio: float, *names: str) -> dict[str, LayerChoice]:
    return {name: LayerChoice(sparsity=Sparsity(ratio=ratio)) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_the_original_stays_as_it_was_to_the_bit(described: Get, name: str) -> None:
    case = described(name)
    before = state_of(case.net)
    layers = sparse(0.5, *(layer.name for layer in case.structure.layers))
    candidate = Candidate(widths=halves(case), layers=layers, recipe=Recipe(recover_steps=2))
    made = applied(case, candidate, classifies=False)
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


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_exactly_the_share_of_smallest_weights_is_zero(described: Get, ratio: float) -> None:
    case = described("separable")
    names = [layer.name for layer in case.structure.layers]
    made = applied(case, Candidate(layers=sparse(ratio, *names)))
    for name in names:
        before = case.net.get_submodule(name).get_parameter("weight")
        after = made.get_submodule(name).get_parameter("weight")
        assert int((after == 0).sum()) == int(ratio * after.numel())
        assert before[after == 0].abs().max() <= before[after != 0].abs().min()
        assert torch.equal(after[after != 0], before[after != 0])


def test_of_equal_weights_still_the_exact_share_goes() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    net[0].weight.fill_(0.5)
    masks = sparsity_masks(net, Candidate(layers=sparse(0.25, "0")))
    hold(net, masks)
    assert int((net[0].weight == 0).sum()) == 16


TWO_OF_FOUR = LayerChoice(sparsity=Sparsity(ratio=0.5, pattern="2:4"))


@pytest.mark.parametrize("recover_steps", [0, 3])
def test_of_every_four_input_channels_two_are_zero_at_each_place_and_output(described: Get, recover_steps: int) -> None:
    case = described("residual")
    names = [layer.name for layer in case.structure.layers if layer.shape[1] % 4 == 0]
    layers = dict.fromkeys(names, TWO_OF_FOUR)
    made = applied(case, Candidate(layers=layers, recipe=Recipe(recover_steps=recover_steps)))
    assert {case.net.get_submodule(name).get_parameter("weight").ndim for name in names} == {2, 4}
    for name in names:
        fours = made.get_submodule(name).get_parameter("weight").unflatten(1, (-1, 4))
        assert bool(((fours == 0).sum(2) == 2).all())


def test_of_four_the_two_smallest_go() -> None:
    net = nn.Sequential(nn.Linear(8, 1, bias=False)).requires_grad_(False)
    net[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, -1.0]]))
    hold(net, sparsity_masks(net, Candidate(layers={"0": TWO_OF_FOUR})))
    assert net[0].weight.tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 0.0, 0.0, -1.0]]


def test_a_pattern_that_does_not_fit_fails_with_the_layers_name() -> None:
    net = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(StageError, match="layer '0' cannot be 2:4 sparse: it has 6 input channels") as caught:
        sparsity_masks(net, Candidate(layers={"0": TWO_OF_FOUR}))
    assert caught.value.stage == "compress"


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


def test_settling_batchnorm_estimates_plain_averages_and_changes_nothing_else() -> None:
    net = nets.seeded(nets.perceptron)
    before = state_of(net)
    data = [nets.rows(64, seed=1), nets.rows(64, seed=2)]
    settle_batchnorm(net, nets.positional, data)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{i}.{what}" for i in "14" for what in ("running_mean", "running_var", "num_batches_tracked")}
    seen = torch.stack([F.linear(b["input"], net[0].weight, net[0].bias) for b in data])
    torch.testing.assert_close(net[1].running_mean, seen.mean(1).mean(0))
    torch.testing.assert_close(net[1].running_var, seen.var(1).mean(0))
    assert net[1].momentum == 0.1
    assert not any(module.training for module in net.modules())


def test_settling_forgets_statistics_that_were_wrong() -> None:
    data = [nets.rows(256, seed=seed) for seed in range(4)]
    net = nets.seeded(nets.perceptron)
    settle_batchnorm(net, nets.positional, data)
    wanted = net(data[0]["input"])
    spoilt = copy.deepcopy(net)
    spoilt[1].running_mean += 5
    spoilt[4].running_var *= 9
    assert (spoilt(data[0]["input"]) - wanted).abs().max() > 0.1
    settle_batchnorm(spoilt, nets.positional, data)
    torch.testing.assert_close(spoilt(data[0]["input"]), wanted)


@pytest.fixture(scope="module")
def trained() -> tuple[Described, Tensor, Tensor]:
    """The digits network, and images and labels it was not trained on."""
    net = digits.model().requires_grad_(False)
    parts = digits.split()
    images = parts["train"].tensors[0]

    def inputs(size: int = 2, seed: int = 0) -> dict[str, Tensor]:
        rows = torch.randint(0, len(images), (size,), generator=torch.Generator().manual_seed(seed))
        return {"image": images[rows]}

    structure, groups = describe(net, lambda model: nets.positional(model, inputs()))
    case = Described(net=net, inputs=inputs, call=nets.positional, structure=structure, groups=groups)
    return case, *parts["validation"].tensors


def share(chosen: Tensor, wanted: Tensor) -> float:
    return float((chosen == wanted).float().mean())


def test_settling_after_a_cut_wins_back_accuracy(trained: tuple[Described, Tensor, Tensor]) -> None:
    case, images, labels = trained
    widths = halves(case)
    cut = cut_widths(case.net, case.groups, widths)
    with torch.no_grad():
        unsettled = share(cut(images).argmax(1), labels)
        settled = share(applied(case, Candidate(widths=widths))(images).argmax(1), labels)
    assert settled > unsettled + 0.1


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

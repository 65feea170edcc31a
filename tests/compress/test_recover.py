import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.recover import distillation_loss, outputs_of, recover
from autocompress.core.errors import StageError
from tests import nets
from tests.compress.conftest import same, state_of


def batches(seed: int = 0) -> Iterator[dict[str, Tensor]]:
    while True:
        yield nets.rows(32, seed=seed)
        seed += 1


def pair() -> tuple[nn.Module, nn.Module]:
    """A teacher, and a copy of it with noise in its weights."""
    teacher = nets.seeded(nets.perceptron)
    student = copy.deepcopy(teacher)
    for i, parameter in enumerate(student.parameters()):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return teacher, student


def loss(student: nn.Module, teacher: nn.Module, *, classifies: bool) -> float:
    x = nets.rows(512, seed=10_000)
    with torch.no_grad():
        got, wanted = (outputs_of(nets.positional(net, x)) for net in (student, teacher))
        return float(distillation_loss(got, wanted, classifies=classifies))


@pytest.mark.parametrize("classifies", [True, False])
def test_recovery_lowers_the_loss_on_items_it_never_saw(classifies: bool) -> None:
    teacher, student = pair()
    before = loss(student, teacher, classifies=classifies)
    recover(student, teacher, nets.positional, batches(), steps=60, classifies=classifies)
    assert loss(student, teacher, classifies=classifies) < 0.5 * before


def test_recovery_is_the_same_each_time() -> None:
    states = []
    for _ in range(2):
        teacher, student = pair()
        recover(student, teacher, nets.positional, batches(), steps=5, classifies=True)
        states.append(state_of(student))
    assert same(*states)


def test_the_teacher_is_not_trained() -> None:
    teacher, student = pair()
    before = state_of(teacher)
    recover(student, teacher, nets.positional, batches(), steps=3, classifies=True)
    assert same(teacher.state_dict(), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_what_must_hold_is_called_after_each_step() -> None:
    teacher, student = pair()
    seen = []
    recover(
        student, teacher, nets.positional, batches(), steps=4, classifies=True,
        after_step=lambda: seen.append(student[0].weight.detach().clone()),
    )  # fmt: skip
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[-1], student[0].weight)


def test_a_loss_that_is_not_finite_fails_in_its_stage() -> None:
    teacher, student = pair()
    student[0].weight[0, 0] = float("nan")
    with pytest.raises(StageError, match="the distillation loss is nan at step 0") as caught:
        recover(student, teacher, nets.positional, batches(), steps=3, classifies=True)
    assert caught.value.stage == "recover"


def test_equal_outputs_have_no_loss_and_others_do() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for classifies in (True, False):
        assert float(distillation_loss([logits], [logits], classifies=classifies)) == pytest.approx(0, abs=1e-6)
        assert float(distillation_loss([logits.flip(1)], [logits], classifies=classifies)) > 0.01
    shifted = logits + 3
    assert float(distillation_loss([shifted], [logits], classifies=True)) == pytest.approx(0, abs=1e-5)
    assert float(distillation_loss([shifted], [logits], classifies=False)) > 1


def test_squared_error_does_not_depend_on_the_outputs_unit() -> None:
    rng = torch.Generator().manual_seed(0)
    got, wanted = torch.randn(64, 3, generator=rng), torch.randn(64, 3, generator=rng)
    small, large = (float(distillation_loss([k * got], [k * wanted], classifies=False)) for k in (0.1, 100.0))
    assert small == pytest.approx(large, rel=1e-4)


def test_outputs_are_all_floating_tensors_in_order_however_held() -> None:
    a, b, n = torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.int64)
    assert [id(t) for t in outputs_of({"x": a, "y": (n, [b])})] == [id(a), id(b)]
    assert outputs_of(n) == []

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress import recover
from autocompress.compress.cut import cut
from autocompress.compress.layers import describe
from autocompress.compress.material import Material
from autocompress.compress.recover import has_bfloat16, train
from autocompress.compress.settle import settle_batchnorm
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError
from autocompress.core.recipe import Distill, Train
from autocompress.tasks import digits
from tests import nets
from tests.compress.conftest import same, state_of
from tests.compress.materials import of_tensors

LABELS = Train(distill=Distill(kind="none"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Steps of so small a network take no less time on two, and on busy cores much more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return digits.model().requires_grad_(False)


@pytest.fixture(scope="module")
def few(original: nn.Module) -> Material:
    """A hundred labelled digits."""
    images, labels = digits.split()["train"].tensors
    return of_tensors(images[:100], labels[:100], F.cross_entropy)


@pytest.fixture(scope="module")
def narrow(original: nn.Module, few: Material) -> nn.Module:
    """The digits network at half its widths, untrained."""
    batch = few.fetch([0, 1])[0]
    _, anatomy = describe(original, lambda model: few.call(model, batch))
    widths = {g.name: g.width // 2 for g in anatomy.groups}
    made = cut(original, anatomy, Candidate(widths=widths), before=Candidate())
    settle_batchnorm(made, few.call, (b for b, _ in few.calibration(100, 50)))
    return made


def accuracy(net: nn.Module) -> float:
    images, labels = digits.split()["validation"].tensors
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def trained(net: nn.Module, how: Train, material: Material, teacher: nn.Module, **more: Any) -> nn.Module:
    net = copy.deepcopy(net)
    given: dict[str, Any] = {"teachers": [teacher], "steps": 25, "seed": 0}
    train(net, how, material, **{**given, **more})
    return net


def test_with_a_teacher_the_same_steps_on_few_items_give_more(
    narrow: nn.Module, few: Material, original: nn.Module
) -> None:
    before = state_of(original)
    taught, alone = (trained(narrow, how, few, original) for how in (Train(), LABELS))
    assert accuracy(taught) > accuracy(alone) + 0.01
    assert accuracy(taught) > accuracy(narrow) + 0.1
    assert same(original.state_dict(), before)


@pytest.mark.parametrize("kind", ["features", "attention"])
def test_features_of_another_width_are_learned_from(
    kind: Any, narrow: nn.Module, few: Material, original: nn.Module
) -> None:
    how = Train(distill=Distill(kind=kind))
    made = trained(narrow, how, few, original, steps=20)
    assert accuracy(made) > accuracy(narrow) + 0.05
    assert made.state_dict().keys() == narrow.state_dict().keys()
    assert not same(made.state_dict(), trained(narrow, Train(), few, original, steps=20).state_dict())
    assert not any(module._forward_hooks for module in (*made.modules(), *original.modules()))


def test_no_labels_are_needed_to_learn_from_a_teacher(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    unlabelled = replace(few, loss=None)
    one, other = (trained(narrow, Train(), given, original, steps=3) for given in (unlabelled, few))
    assert same(one.state_dict(), other.state_dict())
    for lesson in (Distill(kind="none"), Distill(weight=0.5)):
        with pytest.raises(StageError, match="learns from labels, but the loss takes no targets") as caught:
            trained(narrow, Train(distill=lesson), unlabelled, original)
        assert caught.value.stage == "recover"


def test_equal_seeds_give_equal_weights_to_the_bit(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    one, again, other = (trained(narrow, Train(), few, original, steps=5, seed=s) for s in (1, 1, 2))
    assert same(one.state_dict(), again.state_dict())
    assert not same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("teachers", ["mean", "confident", "self"])
def test_several_teachers_teach_otherwise_than_one(
    teachers: Any, narrow: nn.Module, few: Material, original: nn.Module
) -> None:
    contrary = nets.seeded(lambda: copy.deepcopy(narrow))
    how = Train(distill=Distill(teachers=teachers))
    made = trained(narrow, how, few, original, teachers=[original, contrary], steps=8)
    alone = trained(narrow, Train(), few, original, teachers=[original, contrary], steps=8)
    assert not same(made.state_dict(), alone.state_dict())


def test_an_assistant_is_taught_first_and_teaches_then(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    asked: list[float] = []
    told: list[tuple[int, int]] = []
    assistant = copy.deepcopy(narrow)
    before = state_of(assistant)

    def resize(ratio: float) -> nn.Module:
        asked.append(ratio)
        return assistant

    how = Train(distill=Distill(assistants=(0.7,)))
    trained(narrow, how, few, original, steps=9, resize=resize, progress=lambda step, of, _: told.append((step, of)))
    assert asked == [0.7]
    assert not same(assistant.state_dict(), before)
    assert told == [(i, 4) for i in range(1, 5)] + [(i, 5) for i in range(1, 6)]
    told.clear()
    three = Train(distill=Distill(assistants=(0.7, 0.6)))
    trained(narrow, three, few, original, steps=9, resize=resize, progress=lambda step, of, _: told.append((step, of)))
    assert told == [(i, 3) for i in range(1, 4)] * 3
    with pytest.raises(StageError, match="assistants need a model that can be cut"):
        trained(narrow, how, few, original)


def test_patience_keeps_the_best_weights_it_saw(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    values = itertools.chain([0.3, 0.9, 0.5, 0.6, 0.7], itertools.repeat(0.0))
    seen: list[dict[str, Tensor]] = []

    def validate(net: nn.Module) -> float:
        seen.append(state_of(net))
        return next(values)

    net = copy.deepcopy(narrow)
    looking = replace(few, validate=validate)
    done = train(net, Train(patience=3), looking, teachers=[original], steps=20, seed=0)
    assert (done.steps, done.best, done.stopped) == (10, 0.9, "patience")
    assert same(net.state_dict(), seen[1])


def test_seconds_end_a_training(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    done = train(copy.deepcopy(narrow), Train(seconds=1e-6), few, teachers=[original], steps=50, seed=0)
    assert (done.steps, done.stopped) == (1, "seconds")


def test_a_loss_that_is_not_finite_is_a_failure_of_recovery(few: Material, original: nn.Module) -> None:
    broken = copy.deepcopy(original)
    next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(StageError, match=r"the loss is nan at step 1: lower `learning_rate`") as caught:
        trained(broken, Train(), few, original)
    assert caught.value.stage == "recover"


def test_a_trained_model_is_left_as_a_model_is_left(narrow: nn.Module, few: Material, original: nn.Module) -> None:
    for how in (Train(), Train(optimizer="sgd"), Train(optimizer="adamw")):
        made = trained(narrow, how, few, original, steps=2)
        assert not any(module.training for module in made.modules())
        assert all(p.is_contiguous() and not p.requires_grad and p.grad is None for p in made.parameters())
        assert not same(made.state_dict(), narrow.state_dict())


def test_a_teachers_answers_are_found_again_on_the_disk(
    narrow: nn.Module, few: Material, original: nn.Module, tmp_path: Path
) -> None:
    runs: list[int] = []
    handle = original.register_forward_hook(lambda *_: runs.append(1))
    first = trained(narrow, Train(), few, original, steps=4, cache=tmp_path)
    asked = len(runs)
    second = trained(narrow, Train(), few, original, steps=4, cache=tmp_path)
    handle.remove()
    assert 0 < asked == len(runs)
    assert same(first.state_dict(), second.state_dict())


def test_outputs_that_are_no_logits_are_matched_by_their_squared_error() -> None:
    teacher, student = (nets.seeded(lambda: nn.Linear(6, 2), seed=s).requires_grad_(False) for s in (0, 1))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    material = of_tensors(x, torch.zeros(64))
    before = F.mse_loss(student(x), teacher(x))
    train(student, Train(optimizer="sgd", learning_rate=0.2), material, teachers=[teacher], steps=60, seed=0)
    assert F.mse_loss(student(x), teacher(x)) < 0.05 * before


def test_in_bfloat16_it_learns_too(
    narrow: nn.Module, few: Material, original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Train(distill=Distill(kind="features", weight=0.5))
    full = trained(narrow, how, few, original, steps=6)
    monkeypatch.setattr(recover, "has_bfloat16", lambda _: True)
    made = trained(narrow, how, few, original, steps=6)
    assert accuracy(made) > accuracy(narrow) + 0.1
    assert not same(made.state_dict(), full.state_dict())
    assert all(p.dtype == torch.float32 for p in made.parameters())


def test_bfloat16_is_what_the_processor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, has in (("flags : avx2 fma", False), ("flags : avx512f avx512_bf16", True)):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: f"model name : x\n{flags}\n")
        assert has_bfloat16(torch.device("cpu")) == has


def test_channels_stay_first_where_a_gradient_would_overrun_its_memory() -> None:
    """A 1x1 convolution with a stride and few input channels; others are faster with channels last."""
    narrow, wide = (nn.Sequential(nn.Conv2d(n, 24, 1, stride=2)) for n in (4, 16))
    assert not recover._channels_last(narrow)
    assert recover._channels_last(wide)
    assert not recover._channels_last(nn.Linear(4, 4))

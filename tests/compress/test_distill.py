from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.distill import Answers, Features, agreed, output_loss
from autocompress.core.errors import StageError
from tests import nets

TEACHER = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])


def test_logits_are_compared_at_their_temperature() -> None:
    student = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    for t in (1.0, 4.0):
        p, q = (F.softmax(x / t, 1) for x in (TEACHER, student))
        wanted = (p * (p / q).log()).sum(1).mean() * t**2
        torch.testing.assert_close(output_loss([student], [TEACHER], classifies=True, temperature=t), wanted)
    assert float(output_loss([TEACHER + 5], [TEACHER], classifies=True, temperature=4.0)) == pytest.approx(0, abs=1e-6)


def test_other_outputs_are_compared_over_their_variance() -> None:
    loss = output_loss([TEACHER + 1], [TEACHER], classifies=False, temperature=4.0)
    torch.testing.assert_close(loss, 1 / TEACHER.var(correction=0))


def test_only_the_first_output_of_a_classifier_holds_logits() -> None:
    loss = output_loss([TEACHER, TEACHER + 1], [TEACHER, TEACHER], classifies=True, temperature=4.0)
    torch.testing.assert_close(loss, 1 / TEACHER.var(correction=0))


def test_teachers_agree_on_mean_probabilities_or_on_those_of_the_surer() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.1]])
    (mean,) = agreed([[sure], [unsure]], classifies=True, confident=False)
    torch.testing.assert_close(mean.exp(), (F.softmax(sure, 1) + F.softmax(unsure, 1)) / 2)
    (weighted,) = agreed([[sure], [unsure]], classifies=True, confident=True)
    weights = torch.stack([(-torch.special.entr(F.softmax(x, 1)).sum()).exp() for x in (sure, unsure)])
    wanted = (weights[0] * F.softmax(sure, 1) + weights[1] * F.softmax(unsure, 1)) / weights.sum()
    torch.testing.assert_close(weighted.exp(), wanted)
    (plain,) = agreed([[sure], [unsure]], classifies=False, confident=True)
    torch.testing.assert_close(plain, (sure + unsure) / 2)


class Counting(nn.Module):
    """Doubles its input and counts the items it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.seen = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.factor * x


def test_fixed_items_are_answered_once_and_on_disk_for_the_next(tmp_path: Path) -> None:
    data = torch.arange(10.0)[:, None]
    teacher = Counting()

    def ask(answers: Answers, *rows: int) -> None:
        (got,) = answers(np.array(rows), {"x": data[list(rows)]})
        assert torch.equal(got, 2 * data[list(rows)])

    def opened(*, fixed: bool = True, folder: Path | None = tmp_path) -> Answers:
        return Answers(teacher, lambda m, b: m(b["x"]), len(data), fixed=fixed, folder=folder)

    answers = opened()
    ask(answers, 1, 2)
    ask(answers, 2, 3, 1)
    assert teacher.seen == 3
    answers.save()
    ask(opened(), 3, 2)
    assert teacher.seen == 3
    with torch.no_grad():
        teacher.factor.fill_(3.0)  # another teacher: its answers are others
    assert opened()(np.array([1]), {"x": data[[1]]})[0].tolist() == [[3.0]]
    loose = opened(fixed=False)
    for _ in range(2):
        loose(np.array([1]), {"x": data[[1]]})
    assert teacher.seen == 6


def test_features_that_are_equal_cost_nothing_and_a_projection_finds_them_at_another_width() -> None:
    def net(width: int) -> nn.Module:
        return nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3)))

    teacher, batch = net(8), {"x": torch.randn(4, 3, 9, 9)}

    def call(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(b["x"])
        return out

    for attention in (False, True):
        same = Features(net(8), teacher, call, batch, attention=attention)  # type: ignore[arg-type]
        assert same.points == ("0", "2")
        assert float(same.loss()) == pytest.approx(0, abs=1e-9)
        assert same.parameters() == []
        same.close()
    other = Features(net(6), teacher, call, batch, attention=False)  # type: ignore[arg-type]
    assert [tuple(p.shape) for p in other.parameters()] == [(8, 6), (8,)]
    before = other.loss()
    optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        other.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert other.loss() < 0.9 * before


def test_models_without_a_common_place_say_so() -> None:
    one, two = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(StageError, match="no modules of one name whose features compare: use kind: logits"):
        Features(one, two, lambda m, b: m(b["x"]), {"x": torch.randn(2, 4)}, attention=False)

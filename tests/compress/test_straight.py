from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autocompress.compress.straight import Book, Even, Range


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(rounding: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What comes out, and the gradients of x and of the scale for some gradient of the output."""
    x = x.clone().requires_grad_()
    rounded = rounding(x)
    rounded.backward(normal(*x.shape, seed=1))
    (stretch,) = rounding.parameters()
    assert x.grad is not None
    assert stretch.grad is not None
    return rounded.detach(), x.grad, stretch.grad


def by_autograd(x: Tensor, ends: Any, stretch: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by plain operations: rounding alone has gradient 1, the zero point none."""
    x = x.clone().requires_grad_()
    stretch = stretch.detach().requires_grad_()
    low, high = torch.tensor(ends) * stretch.exp()
    scale = (high - low) / steps
    zero = (-low / scale).round().detach()
    exact = x / scale
    whole = exact + (exact.round() - exact).detach()
    inside = (exact >= -zero - 0.5) & (exact <= steps - zero + 0.5)

    rounded = torch.where(inside, whole * scale, torch.where(exact > 0, high, low))
    rounded.backward(normal(*x.shape, seed=1))
    assert x.grad is not None
    assert stretch.grad is not None
    return rounded.detach(), x.grad, stretch.grad


@pytest.mark.parametrize("ends", [(0.0, 1.5), (-0.8, 1.2), (-1.0, 0.0)])
def test_activations_are_rounded_and_have_the_gradients_of_lsq(ends: tuple[float, float]) -> None:
    x = normal(4, 3, 5, 5)
    rounding = Range(*ends, 4, symmetric=False)
    rounded, to_x, to_stretch = gradients(rounding, x)
    wanted, wanted_x, wanted_stretch = by_autograd(x, ends, rounding.stretch, 15)
    torch.testing.assert_close(to_x, wanted_x)
    scale = (ends[1] - ends[0]) / 15
    # A step of the optimizer moves the scale relatively as far as LSQ's, whose gradient is over √(features · steps).
    pace = 1 / (scale**2 * (75 * 15) ** 0.5)
    torch.testing.assert_close(to_stretch, wanted_stretch * pace, rtol=1e-2, atol=1e-3 * float(to_stretch.abs().max()))
    zero = round(-ends[0] / scale)
    torch.testing.assert_close(rounded, torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 15))
    assert (rounded - wanted).abs().max() <= scale
    assert rounding(torch.zeros(1, 1)).item() == 0


def test_a_symmetric_range_has_one_end_and_an_odd_number_of_values() -> None:
    rounding = Range(-0.5, 1.4, 3, symmetric=True)
    values = rounding(torch.linspace(-3, 3, 200)[None]).unique()
    torch.testing.assert_close(values, torch.linspace(-1.4, 1.4, 7))
    assert rounding.stretch.shape == (1,)


def test_the_order_in_memory_does_not_change_what_is_learned() -> None:
    x = normal(4, 6, 5, 7)
    wanted = gradients(Range(-1.0, 1.0, 4, symmetric=False), x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for one, two in zip(gradients(Range(-1.0, 1.0, 4, symmetric=False), other), wanted, strict=True):
            torch.testing.assert_close(one, two)


def test_weights_are_rounded_by_channel_and_the_scale_learns_as_in_lsq() -> None:
    weight, scale = normal(6, 4, 3, 3), np.linspace(0.1, 0.6, 6, dtype=np.float32)
    rounding = Even(scale, 3)
    rounded, to_weight, to_stretch = gradients(rounding, weight)
    steps = rounded / torch.from_numpy(scale)[:, None, None, None]
    torch.testing.assert_close(steps, steps.round())
    assert steps.abs().max() == 3
    for channel, s in enumerate(scale):
        ends = (-3 * float(s), 3 * float(s))
        x, exact = weight[channel], weight[channel] / s
        grad = normal(*weight.shape, seed=1)[channel]
        inside = exact.abs() <= 3.5
        torch.testing.assert_close(to_weight[channel], grad * inside)
        lsq = (grad * torch.where(inside, exact.round().clamp(-3, 3) - exact, exact.sign() * 3)).sum()
        torch.testing.assert_close(to_stretch[channel], lsq / float(s) / (x.numel() * 3) ** 0.5)
        assert rounded[channel].min() >= ends[0] - 1e-6


def test_a_scale_of_almost_nothing_does_not_outweigh_other_gradients() -> None:
    weight = normal(2, 64)
    weight[1] *= 1e-6
    _, to_weight, to_stretch = gradients(Even((weight.abs().amax(1) / 7).numpy(), 4), weight)
    assert to_stretch[1].abs() < to_weight.norm()


def test_a_codebook_that_moves_holds_means_and_keeps_its_zero() -> None:
    weight = normal(32, 32)
    weight[:8] = 0
    book = Book(np.array([-1.0, 0.0, 0.5, 2.0], np.float32), moves=True)
    for _ in range(30):
        rounded = book(weight)
    assert len(rounded.unique()) == 4
    assert (rounded[:8] == 0).all()
    for value in rounded.unique():
        if value != 0:
            torch.testing.assert_close(weight[rounded == value].mean(), value)
    assert not torch.allclose(book.table, torch.tensor([-1.0, 0.0, 0.5, 2.0]))


def test_a_codebook_for_integer_arithmetic_has_multiples_of_a_63rd_of_the_largest() -> None:
    book = Book(np.array([-1.0, 0.2, 0.5, 2.0], np.float32), moves=True, integer=True)
    values = book(normal(32, 32)).unique()
    steps = 63 * values / values.abs().max()
    assert len(values) == 4
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_a_codebook_rests_while_the_model_is_evaluated() -> None:
    book = Book(np.array([-1.0, 0.0, 0.5, 2.0], np.float32), moves=True).eval()
    book(normal(32, 32))
    assert book.table.tolist() == [-1.0, 0.0, 0.5, 2.0]


def test_a_codebook_that_is_a_pattern_learns_its_scale() -> None:
    book = Book(np.array([-1.0, -0.5, 0.0, 0.5, 1.0], np.float32), moves=False)
    weight = 2 * normal(16, 16)
    optimizer = torch.optim.Adam(book.parameters(), 0.1)
    first = (book(weight) - weight).square().sum().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = (book(weight) - weight).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    values = book(weight).unique()
    torch.testing.assert_close(values / values.max(), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))

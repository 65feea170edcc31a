"""Rounding that lets gradients through (straight-through, Bengio et al., 2013), with scales that are trained.

The gradient of a scale, and how far a step moves it, are LSQ's (Esser et al., 2020). What is trained is the logarithm
of a scale's ratio to where it began: it stays positive, and an optimizer that moves every parameter equally far, as
Adam does, changes a scale of 0.001 no more than one of 1.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_SMALLEST = 1e-8  # scale of a tensor of zeros


class Even(nn.Module):
    """Weights on integers of so many bits, with a trained scale for each index of the first axis."""

    begin: Tensor

    def __init__(self, scale: NDArray[np.float32], bits: int) -> None:
        """Begin with `scale`, of shape (channels,)."""
        super().__init__()
        self.register_buffer("begin", torch.from_numpy(np.array(scale, np.float32)))
        self.stretch = nn.Parameter(torch.zeros(len(scale)))
        self._top = 2 ** (bits - 1) - 1

    @property
    def scale(self) -> Tensor:
        """Of each channel."""
        return self.begin * self.stretch.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest values there are."""
        return _apply(_RoundWeight, weight, self.scale, self._top)


class Book(nn.Module):
    """Weights on the values of a table, which stay the means of the weights they stand for where they may move.

    A value of zero stays zero: pruned weights have it.
    """

    table: Tensor

    def __init__(self, table: NDArray[np.float32], *, moves: bool, integer: bool = False) -> None:
        """Begin with `table`; one that does not move is a fixed pattern, such as powers of two, of a trained scale.

        One that moves has values for `integer` arithmetic, if told: multiples of a 63rd of the largest. These are
        integers of 7 bits, which all kernels take, and of 8.
        """
        super().__init__()
        self._integer = integer
        self.register_buffer("table", torch.from_numpy(np.unique(table)))
        self.stretch = None if moves else nn.Parameter(torch.zeros(1))

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest values there are."""
        if self.stretch is not None:
            return _apply(_RoundToTable, weight, self.stretch.exp(), self.table)
        if self.training:
            self._follow(weight.detach())
        exact, table = weight.detach(), self.table
        if self._integer:
            step = (table.abs().max() / 63).clamp_min(_SMALLEST)
            table = (table / step).round() * step
        return weight - exact + table[_nearest(exact, table)]

    def _follow(self, weight: Tensor) -> None:
        """One step of Lloyd's algorithm."""
        which = _nearest(weight, self.table).flatten()
        count = torch.bincount(which, minlength=len(self.table))
        total = torch.zeros_like(self.table).index_add_(0, which, weight.flatten())
        moved = torch.where((count > 0) & (self.table != 0), total / count.clamp_min(1), self.table)
        self.table.copy_(moved.sort().values)


class Range(nn.Module):
    """Activations on integers of so many bits, between a trained lowest and highest value; zero is one of them."""

    begin: Tensor

    def __init__(self, low: float, high: float, bits: int, *, symmetric: bool) -> None:
        """Begin with values from `low` ≤ 0 to `high` ≥ 0. An end at zero stays there."""
        super().__init__()
        if symmetric:
            high = max(-low, high)
            low = -high
        self.register_buffer("begin", torch.tensor([low, high]))
        self.stretch = nn.Parameter(torch.zeros(1 if symmetric else 2))
        self._steps = 2**bits - (2 if symmetric else 1)

    @property
    def bounds(self) -> Tensor:
        """Lowest and highest value."""
        return self.begin * self.stretch.exp()

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values there are."""
        return _apply(_RoundActivation, x.float(), self.bounds, self._steps)


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, top: int) -> Tensor:
        each = scale.view(-1, *[1] * (weight.ndim - 1))
        exact = weight / each
        rounded = exact.round().clamp_(-top, top)
        ctx.save_for_backward(exact, rounded, scale)
        ctx.top = top
        return rounded * each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        exact, rounded, scale = ctx.saved_tensors
        inside = grad * (exact.abs() <= ctx.top + 0.5)
        to_scale = (grad * rounded - inside * exact).flatten(1).sum(1)
        return inside, to_scale * _pace(exact[0].numel(), ctx.top, scale), None


class _RoundToTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        exact = weight / scale
        rounded = table[_nearest(exact, table)]
        ctx.save_for_backward(exact, rounded, scale, table)
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        exact, rounded, scale, table = ctx.saved_tensors
        inside = grad * ((exact >= table[0]) & (exact <= table[-1]))
        to_scale = (grad * rounded - inside * exact).sum().view(1)
        return inside, to_scale * _pace(exact.numel(), max(1, len(table) // 2), scale), None


class _RoundActivation(torch.autograd.Function):
    """In few passes over memory: five forwards and five backwards, each about as long as a rectifier's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Tensor, steps: int) -> Tensor:
        low, high = bounds.tolist()
        scale = max((high - low) / steps, _SMALLEST)
        zero = round(-low / scale)
        low, high = -zero * scale, (steps - zero) * scale
        ctx.ends, ctx.scale, ctx.steps = (low, high), scale, steps
        x = x if _is_dense(x) else x.contiguous()
        rounded = x.clamp(low, high).div_(scale).round_().mul_(scale)
        ctx.save_for_backward(x, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, rounded = ctx.saved_tensors
        (low, high), scale = ctx.ends, ctx.scale
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        inside = torch.ops.aten.hardtanh_backward(grad, x, low - scale / 2, high + scale / 2)
        kept = _dot(inside, rounded)
        error = (kept - _dot(inside, x)) / (scale * ctx.steps)
        beyond = _dot(grad, rounded) - kept  # high × the gradient above it, and low × the gradient below it
        both = grad.sum() - inside.sum() if low < 0 else beyond / max(high, _SMALLEST)
        above = (beyond - low * both) / max(high - low, _SMALLEST)
        to_bounds = torch.stack([both - above - error, above + error])
        return inside, to_bounds * _pace(x[0].numel(), ctx.steps, x.new_tensor(scale)), None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    rounded: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return rounded


def _pace(count: int, top: int, scale: Tensor) -> Tensor:
    """What makes a step of the logarithm move a scale relatively as far as LSQ does, with its 1/√(count · top).

    Scales of weights whose norm is below about 1 move less: they would outweigh all else in a clipped gradient.
    """
    least = 1 / (top * float(count) ** 0.5)
    return torch.reciprocal(scale.clamp_min(least).square() * float(count * top) ** 0.5)


def _nearest(weight: Tensor, table: Tensor) -> Tensor:
    return torch.bucketize(weight.contiguous(), (table[1:] + table[:-1]) / 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of two tensors that lie in memory alike, without gaps."""
    return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))

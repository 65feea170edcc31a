"""Low rank: a layer's weight as a product of two smaller ones, the best there is by its singular values.

Linear: W ≈ U·V. A convolution either k×k to `rank` channels and then 1×1 (Zhang et al., 2015), or k×1 and then 1×k
(Jaderberg et al., 2014).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Factors = Literal["channel", "spatial"]


class Factored(nn.Sequential):
    """Two layers in the place of one; `0` gives `rank` channels, `1` has the bias."""


class FactoredLinear(Factored):
    """Two linear layers; whoever asks for weight and bias, as torch's encoder layer does, gets those of one."""

    @property
    def weight(self) -> Tensor:
        """The product of both weights."""
        first, second = (self.get_submodule(i).get_parameter("weight") for i in "01")
        return second @ first

    @property
    def bias(self) -> Tensor | None:
        """The second one's."""
        found = self.get_submodule("1").bias
        return found if isinstance(found, Tensor) else None


def full_rank(shape: Sequence[int], factors: Factors = "channel") -> int:
    """The largest rank of a weight of that shape, split so."""
    return min(_sides(shape, factors))


def saves(shape: Sequence[int], rank: int, factors: Factors = "channel") -> bool:
    """Whether two factors of that rank have fewer weights than the layer."""
    return rank * sum(_sides(shape, factors)) < math.prod(shape)


def factorize(model: nn.Module, ranks: Mapping[str, tuple[int, Factors]]) -> dict[str, tuple[str, str]]:
    """Split layers in place; a layer whose full rank is no more than the one wanted stays whole.

    Grouped and depthwise convolutions have no weight to split and stay whole too.

    Args:
        ranks: inner dimension, and how a convolution is split, by layer.

    Returns:
        The names of the two factors, by layer.
    """
    done = {}
    for name, (rank, factors) in ranks.items():
        layer = model.get_submodule(name)
        split = _split(layer, rank, factors)
        if split is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, split.train(layer.training))
            done[name] = (f"{name}.0", f"{name}.1")
    return done


def expand(model: nn.Module) -> dict[str, str]:
    """For each factor in the model, the layer it is of."""
    wholes = [name for name, module in model.named_modules() if isinstance(module, Factored)]
    return {f"{name}.{i}": name for name in wholes for i in (0, 1)}


def _sides(shape: Sequence[int], factors: Factors) -> tuple[int, int]:
    """Rows and columns of the matrix that is split."""
    out, into, *kernel = shape
    if factors == "spatial" and len(kernel) == 2:
        return out * kernel[1], into * kernel[0]
    return out, into * math.prod(kernel)


def _split(layer: nn.Module, rank: int, factors: Factors) -> Factored | None:
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
        return None
    weight = layer.weight.detach()
    if rank >= full_rank(weight.shape, factors):
        return None
    if isinstance(layer, nn.Linear):
        down, up = _factors(weight, rank)
        first: nn.Module = nn.Linear(weight.shape[1], rank, bias=False)
        second: nn.Module = nn.Linear(rank, len(weight), bias=layer.bias is not None)
    elif factors == "spatial" and isinstance(layer, nn.Conv2d):
        return _spatial(layer, rank)
    else:
        down, up = _factors(weight.flatten(1), rank)
        down, up = down.view(rank, *weight.shape[1:]), up.view(len(weight), rank, *(1,) * (weight.ndim - 2))
        kind: Any = type(layer)
        first = kind(layer.in_channels, rank, **_geometry(layer), bias=False)
        second = kind(rank, layer.out_channels, 1, bias=layer.bias is not None)
    return _filled(first, second, down, up, layer.bias)


def _spatial(layer: nn.Conv2d, rank: int) -> Factored | None:
    """k×1 and then 1×k: rows of the matrix are (output, column), its columns (input, row)."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    weight = layer.weight.detach()
    out, into, height, width = weight.shape
    down, up = _factors(weight.permute(0, 3, 1, 2).reshape(out * width, into * height), rank)
    first = nn.Conv2d(
        into, rank, (height, 1), (layer.stride[0], 1), (layer.padding[0], 0), (layer.dilation[0], 1), bias=False
    )
    second = nn.Conv2d(
        rank,
        out,
        (1, width),
        (1, layer.stride[1]),
        (0, layer.padding[1]),
        (1, layer.dilation[1]),
        bias=layer.bias is not None,
    )
    up = up.view(out, width, rank).permute(0, 2, 1)[:, :, None, :]
    return _filled(first, second, down.view(rank, into, height, 1), up, layer.bias)


def _geometry(layer: Any) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors with the least squared error, each with the roots of the singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def _filled(first: nn.Module, second: nn.Module, down: Tensor, up: Tensor, bias: Tensor | None) -> Factored:
    with torch.no_grad():
        first.get_parameter("weight").copy_(down)
        second.get_parameter("weight").copy_(up)
        if bias is not None:
            second.get_parameter("bias").copy_(bias)
    kind = FactoredLinear if isinstance(first, nn.Linear) else Factored
    return kind(first, second).requires_grad_(False)

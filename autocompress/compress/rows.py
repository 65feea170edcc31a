"""What layers read and give, a sample of it as rows of matrices: for whoever fits or rounds a layer on its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.material import Batch
from autocompress.compress.watched import watched

PLACES = 64  # of each item's output that are looked at
AT_ONCE = 8  # layers whose outputs are kept in memory
Layer = nn.Conv1d | nn.Conv2d | nn.Linear


class Reached(Exception):
    """What was waited for is there: the rest of the forward is of no interest."""


def _places(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of an output that are looked at: the same for the original and the cut model, others each batch."""
    chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(batch))[:PLACES]
    return chosen // width, chosen % width


def outputs_at(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    run: Callable[[nn.Module, Batch], None],
) -> dict[str, list[Tensor]]:
    """What the original's layers give at the places, `[rows, channels]` a batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(name: str, layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        y = _planes(layer, output)
        i, j = _places(len(found[name]), *y.shape[2:])
        found[name].append(y[:, :, i, j].movedim(1, -1).flatten(0, 1))

    with watched(model, names, look):
        for batch in batches:
            run(model, batch)
    return found


def inputs_at(
    model: nn.Module,
    name: str,
    batches: Sequence[Batch],
    run: Callable[[nn.Module, Batch], None],
) -> list[Tensor]:
    """What a layer reads for its outputs at the places, `[rows, groups, inputs of one output]` a batch."""
    found: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(_patches(layer, inputs[0], len(found)))
        raise Reached

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    for batch in batches:
        try:
            run(model, batch)
        except Reached:
            continue
    handle.remove()
    return found


def _planes(layer: nn.Module, x: Tensor) -> Tensor:
    """Channels on axis 1 and two axes of places."""
    if isinstance(layer, nn.Linear):
        return x.movedim(-1, 1).reshape(len(x), x.shape[-1], 1, -1)
    return x.unsqueeze(2) if isinstance(layer, nn.Conv1d) else x


def _patches(layer: Any, x: Tensor, batch: int) -> Tensor:
    if isinstance(layer, nn.Linear):
        x, kernel, stride, dilation, groups = _planes(layer, x), (1, 1), (1, 1), (1, 1), 1
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = _planes(layer, F.pad(x, layer._reversed_padding_repeated_twice, mode))
        kernel, stride, dilation = (
            (1, *value) if isinstance(layer, nn.Conv1d) else value
            for value in (layer.kernel_size, layer.stride, layer.dilation)
        )
        groups = layer.groups
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    i, j = _places(batch, *sizes)
    taken = [
        x[:, :, i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]]
        for a in range(kernel[0])
        for b in range(kernel[1])
    ]
    patches = torch.stack(taken, 2).permute(0, 3, 1, 2)  # items, places, channels, kernel
    return patches.reshape(-1, groups, x.shape[1] // groups * len(taken))

"""After a cut, what is left of each layer fitted to what the original's layer gave, by least squares.

He et al., Channel Pruning for Accelerating Very Deep Neural Networks (2017), here for every layer in the order in
which they run, so that each makes up for what those before it could not. No training, no labels.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.material import Batch, Material
from autocompress.compress.width import ChannelGroup

ITEMS = 256
BATCH = 32
PLACES = 64  # of each item's output that are looked at
AT_ONCE = 8  # layers whose outputs are kept in memory
MOST_INPUTS = 4096  # of one output: the normal equations of more take gigabytes
RIDGE = 1e-3  # of the mean squared input: new weights stay near the old ones where the data do not say
ALIKE = 1e-6  # relative error below which a layer needs nothing
_FITTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
Layer = nn.Conv1d | nn.Conv2d | nn.Linear


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    material: Material,
) -> dict[str, tuple[float, float]]:
    """Fit the layers of `model`, in place, to the outputs that the original's have in the channels that are left.

    Weights and bias of a layer are fitted on every other batch of calibration items, and kept only where the error
    on the batches between falls. Left alone are layers that give what they gave, that run not just once, whose weight
    is shared or computed, and of more than 4,096 inputs to an output.

    Args:
        model: the original cut to `widths`, in eval mode.
        groups: how it was cut.

    Returns:
        By layer: the squared error over the squared output before and after, on items it was not fitted to.
    """
    batches = [batch for batch, _ in material.calibration(ITEMS, BATCH)]
    if len(batches) < 2:
        return {}

    def run(net: nn.Module, batch: Batch) -> None:
        with torch.no_grad():
            material.call(net, batch)

    names = _order(model, original, batches[0], run)
    wanted: dict[str, list[Tensor]] = {}
    errors = {}
    for place, name in enumerate(names):
        if place % AT_ONCE == 0:
            wanted = _outputs(original, names[place : place + AT_ONCE], batches, run)
        kept = _left(groups, widths, name, len(original.get_submodule(name).get_parameter("weight")))
        layer: Any = model.get_submodule(name)
        if len(kept) != len(layer.weight):
            continue  # cut by something else
        targets = [w[:, kept] for w in wanted.pop(name)]
        if (found := _fit(layer, _inputs(model, name, batches, run), targets)) is not None:
            errors[name] = found
    return errors


class _Reached(Exception):
    """The layer that was waited for has its input: the rest of the forward is of no interest."""


def _places(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of an output that are looked at: the same for the original and the cut model, others each batch."""
    chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(batch))[:PLACES]
    return chosen // width, chosen % width


def _order(model: nn.Module, original: nn.Module, batch: Batch, run: Callable[[nn.Module, Batch], None]) -> list[str]:
    """The layers of both that can be fitted, as they run."""
    seen: list[str] = []
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    theirs = {name: type(module) for name, module in original.named_modules()}
    handles = []
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")  # none where it is computed
        if type(layer) not in _FITTED or theirs.get(name) is not type(layer) or weight is None:
            continue
        if uses[id(weight)] == 1 and weight[0].numel() <= MOST_INPUTS:
            handles.append(layer.register_forward_hook(lambda *_, name=name: seen.append(name)))
    run(model, batch)
    for handle in handles:
        handle.remove()
    often = Counter(seen)
    return [name for name in seen if often[name] == 1]


def _outputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    run: Callable[[nn.Module, Batch], None],
) -> dict[str, list[Tensor]]:
    """What the original's layers give at the places, `[rows, channels]` a batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(name: str, layer: nn.Module, output: Tensor) -> None:
        y = _planes(layer, output)
        i, j = _places(len(found[name]), *y.shape[2:])
        found[name].append(y[:, :, i, j].movedim(1, -1).flatten(0, 1))

    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, _, output, name=name: look(name, m, output))
        for name in names
    ]
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    return found


def _inputs(
    model: nn.Module,
    name: str,
    batches: Sequence[Batch],
    run: Callable[[nn.Module, Batch], None],
) -> list[Tensor]:
    """What a layer reads for its outputs at the places, `[rows, groups, inputs of one output]` a batch."""
    found: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(_patches(layer, inputs[0], len(found)))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    for batch in batches:
        try:
            run(model, batch)
        except _Reached:
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


def _left(groups: Sequence[ChannelGroup], widths: Mapping[str, int], name: str, count: int) -> list[int]:
    """The output channels of a layer that a cut leaves."""
    gone: set[int] = set()
    for group in groups:
        if group.name not in widths:
            continue
        removed = group.removed(widths[group.name])
        for cut in group.cuts:
            if cut.module == name and not cut.is_input:
                gone.update(i for r, i in zip(cut.root, cut.index, strict=True) if r in removed)
    return [i for i in range(count) if i not in gone]


def _fit(layer: Layer, rows: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[float, float] | None:
    """Fit on the even batches where that helps on the odd ones; the errors there, None where there is none."""
    weight = layer.weight.detach()
    groups, constant = rows[0].shape[1], layer.bias is not None
    old = weight.reshape(groups, len(weight) // groups, -1).movedim(1, 2)
    if layer.bias is not None:
        old = torch.cat([old, layer.bias.detach().view(groups, 1, -1)], 1)
    x_fit, x_held = (_joined(rows[start::2], constant) for start in (0, 1))
    y_fit, y_held = (torch.cat(list(targets[start::2])) for start in (0, 1))
    y_fit, y_held = (y.view(len(y), groups, -1) for y in (y_fit, y_held))
    before = _error(x_held, y_held, old)
    if before <= ALIKE:
        return None
    # Around the old weights: (XᵀX + λ) Δ = Xᵀ (Y − X·old)
    gram = torch.einsum("ngi,ngj->gij", x_fit, x_fit).double()
    slope = torch.einsum("ngi,ngo->gio", x_fit, y_fit - torch.einsum("ngi,gio->ngo", x_fit, old)).double()
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * mean[:, None])
    new = old + torch.linalg.solve(gram, slope).to(old.dtype)
    after = _error(x_held, y_held, new)
    if not after < before:
        return before, before
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(new[:, -1].flatten())
            new = new[:, :-1]
        layer.weight.copy_(new.movedim(2, 1).reshape(weight.shape))
    return before, after


def _joined(rows: Sequence[Tensor], constant: bool) -> Tensor:
    x = torch.cat(list(rows))
    return torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2) if constant else x


def _error(x: Tensor, y: Tensor, weight: Tensor) -> float:
    wrong = torch.einsum("ngi,gio->ngo", x, weight) - y
    return float(wrong.square().sum() / y.square().sum().clamp_min(1e-12))

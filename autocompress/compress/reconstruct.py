"""After a cut, what is left of each layer fitted to what the original's layer gave, by least squares.

He et al., Channel Pruning for Accelerating Very Deep Neural Networks (2017), here for every layer in the order in
which they run, so that each makes up for what those before it could not. No training, no labels.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.material import Batch, Material
from autocompress.compress.rows import AT_ONCE, Layer, inputs_at, outputs_at
from autocompress.compress.watched import watched
from autocompress.compress.width import ChannelGroup

ITEMS = 256
BATCH = 32
MOST_INPUTS = 4096  # of one output: the normal equations of more take gigabytes
RIDGE = 1e-3  # of the mean squared input: new weights stay near the old ones where the data do not say
ALIKE = 1e-6  # relative error below which a layer needs nothing
_FITTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


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
            wanted = outputs_at(original, names[place : place + AT_ONCE], batches, run)
        kept = _left(groups, widths, name, len(original.get_submodule(name).get_parameter("weight")))
        layer: Any = model.get_submodule(name)
        if len(kept) != len(layer.weight):
            continue  # cut by something else
        targets = [w[:, kept] for w in wanted.pop(name)]
        if (found := _fit(layer, inputs_at(model, name, batches, run), targets)) is not None:
            errors[name] = found
    return errors


def _order(model: nn.Module, original: nn.Module, batch: Batch, run: Callable[[nn.Module, Batch], None]) -> list[str]:
    """The layers of both that can be fitted, as they run."""
    seen: list[str] = []
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    theirs = {name: type(module) for name, module in original.named_modules()}
    names = []
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")  # none where it is computed
        if type(layer) not in _FITTED or theirs.get(name) is not type(layer) or weight is None:
            continue
        if uses[id(weight)] == 1 and weight[0].numel() <= MOST_INPUTS:
            names.append(name)
    with watched(model, names, lambda name, *_: seen.append(name)):
        run(model, batch)
    often = Counter(seen)
    return [name for name in seen if often[name] == 1]


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

"""What matters most: in which order a group's channels are kept, and how much the loss feels each weight."""

import copy
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.compress.material import Material
from autocompress.compress.outputs import outputs_of
from autocompress.compress.width import ChannelGroup, Cut
from autocompress.core.recipe import Importance

ITEMS = 256  # calibration items that gradients and activations are looked at on
BATCH = 16  # items whose gradients are added before they are squared
_BatchNorm = nn.modules.batchnorm._BatchNorm


def ranked(
    model: nn.Module, groups: Sequence[ChannelGroup], importance: Importance, material: Material
) -> tuple[ChannelGroup, ...]:
    """The groups with their channels in order of `importance`, most important first; the model is not changed.

    - "magnitude": the order they have, by the L2 norm of all coupled weights.
    - "batchnorm": the sum of |γ| over the group's BatchNorms (Liu et al., Network Slimming, 2017).
    - "taylor": the sum over all coupled weights w of (w·∂L/∂w)², see `taylor` (Molchanov et al., 2019).
    - "activation": the mean of |x| over calibration items and places, x as the layers that read the group see it,
      that is after normalisation and activation function (compare Molchanov et al., 2017).

    A group that has nothing of the kind (no BatchNorm, no layer that reads it) keeps its order.
    """
    if importance == "magnitude":
        return tuple(groups)
    if importance == "activation":
        seen = _activations(model, groups, material)
        return tuple(_reordered(group, _heard(group, seen)) for group in groups)
    scores = _scales(model) if importance == "batchnorm" else _as_weights(model, taylor(model, material))
    power = 1 if importance == "batchnorm" else 2
    return tuple(_reordered(group, _coupled(scores, group, power)) for group in groups)


def taylor(model: nn.Module, material: Material) -> dict[str, Tensor]:
    """How much the loss changes to first order without a weight: for each parameter √(Σ (w·∂L/∂w)²), in its shape.

    The sum is over batches of calibration items: over all of them the gradient of a trained model is next to nothing.
    L is the task's loss, or the mean over items of the outputs' squared norm where there are no targets. The model is
    looked at in eval mode, on the CPU, and is not changed.
    """
    model = copy.deepcopy(model).cpu().eval()
    parameters = {n: p.requires_grad_(True) for n, p in model.named_parameters() if p.is_floating_point()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch, targets in material.calibration(ITEMS, BATCH):
        output = material.call(model, batch)
        if material.loss is not None and targets is not None:
            loss = material.loss(output, targets)
        else:
            loss = torch.stack([out.square().sum() / len(out) for out in outputs_of(output)]).sum()
        slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), slope in zip(parameters.items(), slopes, strict=True):
            if slope is not None:
                total[name] += (p.detach() * slope).square()
    return {name: found.sqrt_() for name, found in total.items()}


def _scales(model: nn.Module) -> nn.Module:
    """A copy in which all but BatchNorm's γ is zero."""
    gammas = {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return _as_weights(model, {**zero, **gammas})


def _as_weights(model: nn.Module, scores: dict[str, Tensor]) -> nn.Module:
    """A copy with `scores` in the place of its parameters."""
    model = copy.deepcopy(model)
    model.load_state_dict(scores, strict=False)
    return model


class _Item(namedtuple("_Item", ("dep", "idxs"))):
    """One module of a group as torch-pruning's importances read it."""

    root_idxs: list[int]


def _coupled(scores: nn.Module, group: ChannelGroup, power: int) -> Tensor:
    """The sum of |score|^power over what is cut with each channel, `[width]`."""
    items = []
    for cut in group.cuts:
        item = _Item(SimpleNamespace(layer=scores.get_submodule(cut.module), pruning_fn=cut.prune), list(cut.index))
        item.root_idxs = list(cut.root)
        items.append(item)
    measure = tp.importance.GroupMagnitudeImportance(p=power, normalizer=None)
    found: Tensor = measure(items)
    return found


def _activations(model: nn.Module, groups: Sequence[ChannelGroup], material: Material) -> dict[str, Tensor]:
    """The mean |input| of each channel, by layer that reads a group."""
    model = copy.deepcopy(model).eval()
    names = {cut.module for group in groups for cut in group.cuts if _reads(model, cut)}
    total: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].abs().double()
        by_channel = x.flatten(0, -2) if isinstance(module, nn.Linear) else x.movedim(1, -1).flatten(0, -2)
        total[name] = total.get(name, torch.zeros(())) + by_channel.mean(0) * len(inputs[0])

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, inputs, name=name: look(name, m, inputs))
    with torch.no_grad():
        for batch, _ in material.calibration(ITEMS, BATCH):
            material.call(model, batch)
    return total


def _reads(model: nn.Module, cut: Cut) -> bool:
    return cut.is_input and isinstance(model.get_submodule(cut.module), nn.Conv1d | nn.Conv2d | nn.Linear)


def _heard(group: ChannelGroup, seen: dict[str, Tensor]) -> Tensor:
    score = torch.zeros(group.width, dtype=torch.float64)
    for cut in group.cuts:
        if cut.is_input and cut.module in seen:
            score.index_add_(0, torch.tensor(cut.root), seen[cut.module][list(cut.index)])
    return score


def _reordered(group: ChannelGroup, score: Tensor) -> ChannelGroup:
    """By falling score, equal ones as they were."""
    by_place = score.double().view(group.partitions, -1).sum(0)
    return replace(group, order=tuple(sorted(group.order, key=lambda i: -float(by_place[i]))))

"""What matters most: in which order a group's channels are kept, and how much the loss feels each weight."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.material import Batch, Material
from autocompress.compress.outputs import outputs_of
from autocompress.compress.width import ChannelGroup
from autocompress.core.recipe import Importance

ITEMS = 256  # calibration items that channels are looked at on
FEWER = 128  # single weights: that is done many times while zeros grow
BATCH = 16  # items a forward
Look = Callable[[str, nn.Module, Tensor], Tensor | None]


def ranked(
    model: nn.Module, groups: Sequence[ChannelGroup], importance: Importance, material: Material
) -> tuple[ChannelGroup, ...]:
    """The groups with their channels in order of `importance`, most important first; the model is not changed.

    - "magnitude": the order they have, by the L2 norm of all coupled weights.
    - "batchnorm": the sum of |γ| over the group's BatchNorms (Liu et al., Network Slimming, 2017).
    - "taylor": how much the outputs change to first order without the channel: the sum over calibration items of
      (x·∂L/∂x)², x the channel as the layers that read it see it (Molchanov et al., Importance Estimation, 2019).
      L is the outputs' squared norm: the task's loss has next to no gradient on items that a model has learned.
    - "activation": the variance of x times the squared weights that read it, which is what of the next layers'
      outputs goes with the channel and no constant makes up for (An et al., FLAP, 2024).

    A group that has nothing of the kind (no BatchNorm, no layer that reads it) keeps its order.
    """
    if importance == "magnitude":
        return tuple(groups)
    if importance == "batchnorm":
        return _ordered(groups, _scales(model), is_input=False)
    if importance == "activation":
        return _ordered(groups, _variances(model, groups, material), is_input=True)
    felt = _felt(model, groups, material)
    return tuple(_reordered(group, score) for group, score in zip(groups, felt, strict=True))


def taylor(model: nn.Module, material: Material) -> dict[str, Tensor]:
    """How much the loss changes to first order without a weight: for each parameter √(Σ (w·∂L/∂w)²), in its shape.

    The sum is over batches of calibration items: over all of them the gradient of a trained model is next to nothing.
    L is the task's loss, or the mean over items of the outputs' squared norm where there are no targets. The model is
    looked at in eval mode, on the CPU, and is not changed.
    """
    model = copy.deepcopy(model).cpu().eval()
    parameters = {n: p.requires_grad_(True) for n, p in model.named_parameters() if p.is_floating_point()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch, targets in material.calibration(FEWER, BATCH):
        output = material.call(model, batch)
        if material.loss is not None and targets is not None:
            loss = material.loss(output, targets)
        else:
            loss = _squared(output) / BATCH
        slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, p), slope in zip(parameters.items(), slopes, strict=True):
            if slope is not None:
                total[name] += (p.detach() * slope).square()
    return {name: found.sqrt_() for name, found in total.items()}


def _squared(output: Any) -> Tensor:
    return torch.stack([out.square().sum() for out in outputs_of(output)]).sum()


def _scales(model: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's |γ|, by module."""
    return {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }


def _variances(model: nn.Module, groups: Sequence[ChannelGroup], material: Material) -> dict[str, Tensor]:
    """The variance of each input channel over items and places times the squared weights that read it, by layer."""
    sums: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, x: Tensor) -> None:
        rows = x.double().movedim(1, -1).flatten(0, -2)
        ones = torch.ones_like(rows[0])
        sums[name] = sums.get(name, 0) + torch.stack([len(rows) * ones, rows.sum(0), rows.square().sum(0)])

    model = _heard(model, groups, look)
    with torch.no_grad():
        for batch, _ in material.calibration(ITEMS, BATCH):
            material.call(model, batch)
    found = {}
    for name, (count, first, second) in sums.items():
        layer: Any = model.get_submodule(name)
        weight = layer.weight.detach().double().reshape(getattr(layer, "groups", 1), -1, *layer.weight.shape[1:])
        read = weight.flatten(3).square().sum((1, 3)) if weight.ndim > 3 else weight.square().sum(1)
        found[name] = (second / count - (first / count).square()) * read.flatten()
    return found


def _felt(model: nn.Module, groups: Sequence[ChannelGroup], material: Material) -> list[Tensor]:
    """For each group the sum over items of (x·∂L/∂x)², `[width]`; all layers that read a channel count together."""
    heard: list[tuple[str, Tensor]] = []

    def look(name: str, _: nn.Module, x: Tensor) -> Tensor:
        x = x.clone() if x.requires_grad else x.clone().requires_grad_(True)
        heard.append((name, x))
        return x

    model = _heard(model, groups, look)
    total = [torch.zeros(group.width, dtype=torch.float64) for group in groups]
    for batch, _ in material.calibration(ITEMS, BATCH):
        heard.clear()
        loss = _squared(material.call(model, batch))
        slopes = torch.autograd.grad(loss, [x for _, x in heard], allow_unused=True)
        found: dict[str, Tensor] = {}
        for (name, x), slope in zip(heard, slopes, strict=True):
            if slope is not None:
                found[name] = found.get(name, 0) + _by_item((x.detach() * slope).flatten(2).sum(2), batch)
        for score, group in zip(total, groups, strict=True):
            score += _gathered(group, found, is_input=True).square().sum(0)
    return total


def _by_item(rows: Tensor, batch: Batch) -> Tensor:
    """Rows that are parts of items (windows of an image) added up; all of them where they are something else."""
    items = len(next(iter(batch.values())))
    return rows.view(items, -1, rows.shape[1]).sum(1) if len(rows) % items == 0 else rows.sum(0, keepdim=True)


def _heard(model: nn.Module, groups: Sequence[ChannelGroup], look: Look) -> nn.Module:
    """A copy in eval mode in which `look` sees what each layer that reads a group gets, channels on axis 1.

    What it gives back is read instead.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)

    def hook(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs:  # it was given by name
            return inputs
        axis = -1 if isinstance(layer, nn.Linear) else 1
        x = inputs[0].movedim(axis, 1)
        other = look(name, layer, x if x.ndim > 2 else x[:, :, None])
        return inputs if other is None else (other.reshape(x.shape).movedim(1, axis), *inputs[1:])

    for name in {cut.module for group in groups for cut in group.cuts if cut.is_input}:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(lambda m, inputs, name=name: hook(name, m, inputs))
    return model


def _gathered(group: ChannelGroup, found: Mapping[str, Tensor], *, is_input: bool) -> Tensor:
    """What modules say of their channels added up for the group's: `[…, channels]` to `[…, width]`."""
    score = torch.zeros((), dtype=torch.float64)
    for cut in group.cuts:
        if cut.is_input == is_input and cut.module in found:
            said = found[cut.module][..., list(cut.index)].double()
            score = score + said.new_zeros(*said.shape[:-1], group.width).index_add_(-1, torch.tensor(cut.root), said)
    return score


def _ordered(
    groups: Sequence[ChannelGroup], found: Mapping[str, Tensor], *, is_input: bool
) -> tuple[ChannelGroup, ...]:
    return tuple(_reordered(group, _gathered(group, found, is_input=is_input)) for group in groups)


def _reordered(group: ChannelGroup, score: Tensor) -> ChannelGroup:
    """By falling score, equal ones as they were."""
    by_place = score.expand(group.width).reshape(group.partitions, -1).sum(0)
    return replace(group, order=tuple(sorted(group.order, key=lambda i: -float(by_place[i]))))

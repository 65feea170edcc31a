"""Bias correction: what rounding weights does to the mean of each channel is taken off its bias.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), with means that are
measured on calibration items.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.compress.absorb import followers
from autocompress.compress.cluster import codebook
from autocompress.compress.material import Material
from autocompress.compress.quantize import Learned, quantize_weight
from autocompress.compress.rows import Reached
from autocompress.compress.watched import watched
from autocompress.core.candidate import LayerChoice

ITEMS = 128
BATCH = 32


def correct_bias(
    model: nn.Module,
    reference: nn.Module,
    layers: Mapping[str, LayerChoice],
    material: Material,
    learned: Learned,
) -> tuple[str, ...]:
    """Correct the biases of `model` in place, layer by layer as they run, so that each sees those before corrected.

    A layer's bias is its own, or that of the BatchNorm that reads it; one with neither is left alone.

    Args:
        model: whose weights will be rounded; those that lie on `learned` scales are.
        reference: the same model in float, before anything was rounded.

    Returns:
        The names of the layers that were corrected.
    """
    batches = [batch for batch, _ in material.calibration(ITEMS, BATCH)]
    after = followers(model, lambda m: material.call(m, batches[0]))
    rounded = rounded_copy(model, layers, learned)
    runs = _runs(model, layers, lambda m: material.call(m, batches[0]))
    holders = {name: name if _bias(model, name) is not None else after.get(name, "") for name in runs}
    holders = {name: holder for name, holder in holders.items() if holder and _bias(model, holder) is not None}
    with torch.no_grad():
        wanted = _means(reference, {holder: runs[name] for name, holder in holders.items()}, batches, material)
        for name, holder in holders.items():
            error = _means(rounded, {holder: runs[name]}, batches, material)[holder] - wanted[holder]
            for net in (model, rounded):
                bias = _bias(net, holder)
                assert bias is not None
                bias.sub_(error)
    return tuple(holders)


def rounded_copy(model: nn.Module, layers: Mapping[str, LayerChoice], learned: Learned) -> nn.Module:
    """A copy with the weights that the file will have, as far as `layers` tell."""
    rounded = copy.deepcopy(model)
    for name, choice in layers.items():
        weight = rounded.get_submodule(name).get_parameter("weight")
        if choice.weight_bits > 8 or name in learned.scales:
            continue
        array = weight.detach().numpy()
        if choice.levels == "uniform":
            q, scale = quantize_weight(array, choice.weight_bits, 0)
            array = q * scale.reshape(-1, *[1] * (array.ndim - 1))
        else:
            which, table = codebook(array, choice.weight_bits, choice.levels)
            array = table[which]
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.asarray(array, np.float32)))
    return rounded


def _runs(model: nn.Module, layers: Mapping[str, LayerChoice], call: Any) -> Counter[str]:
    """How often convolutions and linear layers among `layers` run, in the order in which they do."""
    seen: Counter[str] = Counter()
    names = [name for name in layers if isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d | nn.Linear)]
    with watched(model, names, lambda name, *_: seen.update([name])), torch.no_grad():
        call(model)
    return seen


def _bias(model: nn.Module, name: str) -> Tensor | None:
    bias = getattr(model.get_submodule(name), "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _means(
    model: nn.Module, runs: Mapping[str, int], batches: list[dict[str, Tensor]], material: Material
) -> dict[str, Tensor]:
    """The mean of each channel that modules give, which run so often in a forward; it ends with the last of them."""
    found: dict[str, list[Tensor]] = {name: [] for name in runs}

    def look(name: str, module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        by_channel = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
        found[name].append(by_channel.flatten(0, -2).mean(0))
        if sum(map(len, found.values())) % sum(runs.values()) == 0:
            raise Reached

    with watched(model, runs, look):
        for batch in batches:
            with contextlib.suppress(Reached):
                material.call(model, batch)
    return {name: torch.stack(means).mean(0) for name, means in found.items()}

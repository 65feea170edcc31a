"""AdaRound: weights rounded up or down as is best for what their layer gives.

Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020): layer by layer, on a sample of what
the layer reads in the model rounded so far, against what it gives in the float model.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.compress.material import Batch, Material
from autocompress.compress.quantize import quantize_weight
from autocompress.compress.rows import AT_ONCE, inputs_at, outputs_at
from autocompress.compress.watched import watched
from autocompress.core.candidate import LayerChoice

ITEMS = 128
BATCH = 32
# Of Adam a layer, with so many rows of the sample in each. On fashion_resnet twice the rows and 1.6 times the steps, at
# half the rate, took 1.8 times as long; outputs were nearer to the float model's with 3 bits, and farther with 4.
STEPS = 250
ROWS = 256
RATE = 2e-2
PUSH = 0.01  # weight of the term that ends the choice between up and down
_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid's ends: 0 and 1 are reached


def adaround(
    model: nn.Module,
    reference: nn.Module,
    layers: Mapping[str, LayerChoice],
    material: Material,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """Put the weights of `layers` on the grid of their bits, in place, and return the grid: scales by layer.

    Layers that are no convolution or linear layer, or do not run, stay as they are and have no scales.

    Args:
        model: in eval mode; what it computes otherwise stays.
        reference: the same model in float; it is not changed.
        layers: with `uniform` levels and at most 8 bits.
    """
    batches = [batch for batch, _ in material.calibration(ITEMS, BATCH)]

    def run(net: nn.Module, batch: Batch) -> None:
        with torch.no_grad():
            material.call(net, batch)

    scales = {}
    generator = torch.Generator().manual_seed(seed)
    order = _in_order(model, layers, batches[0], material)
    for place, name in enumerate(order):
        if place % AT_ONCE == 0:
            given = outputs_at(reference, order[place : place + AT_ONCE], batches, run)
        rows, wanted = torch.cat(inputs_at(model, name, batches, run)), torch.cat(given.pop(name))
        scales[name] = _round(model.get_submodule(name), rows, wanted, layers[name].weight_bits, generator)
    return scales


def _in_order(model: nn.Module, layers: Mapping[str, LayerChoice], batch: Batch, material: Material) -> list[str]:
    seen: list[str] = []
    names = [name for name in layers if type(model.get_submodule(name)) in (nn.Conv1d, nn.Conv2d, nn.Linear)]
    with watched(model, names, lambda name, *_: seen.append(name)), torch.no_grad():
        material.call(model, batch)
    return [name for name in dict.fromkeys(seen) if seen.count(name) == 1]


def _round(
    layer: nn.Module, rows: Tensor, wanted: Tensor, bits: int, generator: torch.Generator
) -> NDArray[np.float32]:
    """Choose up or down for each weight; zeros stay zeros.

    Args:
        rows: what the layer reads for each output, `[rows, groups, inputs]`.
        wanted: what it gives in float, `[rows, channels]`.
    """
    weight = layer.get_parameter("weight").detach()
    scale = torch.from_numpy(quantize_weight(weight.numpy(), bits, 0)[1])
    top, groups = 2 ** (bits - 1) - 1, rows.shape[1]
    exact = (weight.flatten(1) / scale[:, None]).clamp(-top, top)
    down = exact.floor()
    # Begin where the soft rounding is the weight itself.
    share = ((exact - down - _LOW) / (_HIGH - _LOW)).clamp(1e-4, 1 - 1e-4)
    choice = torch.log(share / (1 - share)).requires_grad_(True)
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else torch.zeros(len(weight))
    optimizer = torch.optim.Adam([choice], lr=RATE)
    power = float(wanted.square().mean().clamp_min(1e-12))
    for step in range(STEPS):
        some = torch.randint(0, len(rows), (ROWS,), generator=generator)
        up = _soft(choice)
        soft = (down + up).clamp(-top, top) * scale[:, None]
        got = _product(rows[some], soft, groups) + bias
        loss = (got - wanted[some]).square().mean() / power
        if step > STEPS // 5:  # free at first, then driven to an end, ever more sharply
            sharp = 20 - 18 * (step - STEPS / 5) / (STEPS * 4 / 5)
            loss = loss + PUSH * (1 - (2 * up - 1).abs() ** sharp).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        hard = (down + (_soft(choice) >= 0.5)).clamp(-top, top)
        nearest = exact.round()
        hard[exact == 0] = 0
        # A layer that is no better for it, on all of the sample, is rounded to nearest.
        best = min((hard, nearest), key=lambda q: _error(rows, wanted - bias, q * scale[:, None], groups))
        layer.get_parameter("weight").copy_((best * scale[:, None]).view_as(weight))
    found: NDArray[np.float32] = scale.numpy()
    return found


def _soft(choice: Tensor) -> Tensor:
    return (torch.sigmoid(choice) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _product(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    by_group = weight.view(groups, len(weight) // groups, -1)
    return torch.einsum("ngi,goi->ngo", rows, by_group).flatten(1)


def _error(rows: Tensor, wanted: Tensor, weight: Tensor, groups: int) -> float:
    return float((_product(rows, weight, groups) - wanted).square().sum())

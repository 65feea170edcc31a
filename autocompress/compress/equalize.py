"""Cross-layer equalisation: what one layer gives less of, the next takes more of, and ranges become alike.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.outputs import outputs_of
from autocompress.compress.width import ChannelGroup, Cut, channel_groups

Call = Callable[[nn.Module], Any]
_TOLERANCE = 1e-3
_FAR = 1024.0  # what bends beyond the sample (ReLU6) is seen with channels that many times as large; exact in floats
_TRIES = ((-1.0, 1 / _FAR), (1.0, 1 / _FAR), (1.0, 1.0))  # (sign, extra); the last is what stays
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_BatchNorm = nn.modules.batchnorm._BatchNorm


def equalize(model: nn.Module, call: Call) -> tuple[str, ...]:
    """Scale the channels between layers so that both sides need equal ranges for each channel, in place.

    That changes nothing where what lies between is linear for positive factors: a rectifier, a pool, a BatchNorm in
    eval mode. It is tried for each channel group, also with channels far larger than the sample's, and with their signs
    turned, which wakes those that the sample leaves silent; where outputs change, it is taken back.

    Args:
        model: in eval mode; BatchNorm best absorbed, since weights are looked at without it.

    Returns:
        The names of the groups that were equalised.
    """
    names = {name for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    done = []
    groups, _ = channel_groups(model, call, names)
    with torch.no_grad():
        outputs = outputs_of(call(model))
        for group in groups:
            factor = _factor(model, group)
            if factor is None:
                continue
            before = {name: value.clone() for name, value in model.state_dict().items()}
            for sign, extra in _TRIES:
                model.load_state_dict(before)
                wanted = outputs
                if sign < 0:
                    _apply(model, group, torch.full_like(factor, sign), read=False)
                    wanted = outputs_of(call(model))
                _apply(model, group, extra * factor)
                if not _equal(outputs_of(call(model)), wanted):
                    model.load_state_dict(before)
                    break
            else:
                done.append(group.name)
    return tuple(done)


def _factor(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """What makes the ranges of both sides alike, for each channel; None unless it has one kind of giver and reader."""
    modules = {cut.module: model.get_submodule(cut.module) for cut in group.cuts}
    if not all(isinstance(module, (*_LAYERS, _BatchNorm)) for module in modules.values()):
        return None
    if any(getattr(m, "groups", 1) not in (1, getattr(m, "out_channels", 1)) for m in modules.values()):
        return None
    given, read = torch.zeros(group.width), torch.zeros(group.width)
    for cut in group.cuts:
        module: Any = modules[cut.module]
        if not isinstance(module, _LAYERS):
            continue
        rows = module.weight.detach().transpose(0, 1) if cut.is_input else module.weight.detach()
        largest = rows.abs().flatten(1).amax(1)[list(cut.index)]
        (read if cut.is_input else given).scatter_reduce_(0, torch.tensor(cut.root), largest, "amax")
    if not (bool((given > 0).any()) and bool((read > 0).any())):
        return None
    # Both ranges become √(given · read); silent channels stay as they are.
    return torch.where((given > 0) & (read > 0), (given / read.clamp_min(1e-12)).sqrt(), torch.ones(()))


def _apply(model: nn.Module, group: ChannelGroup, factor: Tensor, read: bool = True) -> None:
    """Take the factor out of what gives the channels, and give it to what reads them, unless `read` is False."""
    for cut in group.cuts:
        if read or not cut.is_input:
            _apply_to(model.get_submodule(cut.module), cut, factor[list(cut.root)])


def _apply_to(module: Any, cut: Cut, factor: Tensor) -> None:
    places = list(cut.index)
    if cut.is_input:
        module.weight[:, places] *= factor.view(1, -1, *[1] * (module.weight.ndim - 2))
        return
    tensors: Mapping[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    depthwise = getattr(module, "groups", 1) > 1
    for name, tensor in tensors.items():
        passes = (isinstance(module, _BatchNorm) or depthwise) and name == "weight"
        if passes or name in ("running_var", "num_batches_tracked"):
            continue  # it multiplies channels that come in scaled already
        tensor[places] /= factor.view(-1, *[1] * (tensor.ndim - 1))


def _equal(got: list[Tensor], wanted: list[Tensor]) -> bool:
    largest = max(float(w.abs().max()) for w in wanted) + 1e-6
    return all(float((g - w).abs().max()) <= _TOLERANCE * largest for g, w in zip(got, wanted, strict=True))

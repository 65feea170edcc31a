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
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_BatchNorm = nn.modules.batchnorm._BatchNorm


def equalize(model: nn.Module, call: Call) -> tuple[str, ...]:
    """Scale the channels between layers so that both sides need equal ranges for each channel, in place.

    That changes nothing where what lies between is linear for positive factors: a rectifier, a pool, a BatchNorm in
    eval mode. It is tried for each channel group, also with channels far larger than the sample's, and taken back where
    outputs change.

    Args:
        model: in eval mode; BatchNorm best absorbed, since weights are looked at without it.

    Returns:
        The names of the groups that were equalised.
    """
    names = {name for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    done = []
    groups, _ = channel_groups(model, call, names)
    with torch.no_grad():
        wanted = outputs_of(call(model))
        for group in groups:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            for extra in (1 / _FAR, 1.0):
                model.load_state_dict(before)
                if not (_scale(model, group, extra) and _equal(outputs_of(call(model)), wanted)):
                    model.load_state_dict(before)
                    break
            else:
                done.append(group.name)
    return tuple(done)


def _scale(model: nn.Module, group: ChannelGroup, extra: float) -> bool:
    """Whether the group has one kind of giver and reader; the ratio of their ranges is then `extra` squared."""
    modules = {cut.module: model.get_submodule(cut.module) for cut in group.cuts}
    if not all(isinstance(module, (*_LAYERS, _BatchNorm)) for module in modules.values()):
        return False
    if any(getattr(m, "groups", 1) not in (1, getattr(m, "out_channels", 1)) for m in modules.values()):
        return False
    given, read = torch.zeros(group.width), torch.zeros(group.width)
    for cut in group.cuts:
        module = modules[cut.module]
        if not isinstance(module, _LAYERS):
            continue
        rows = module.weight.detach().transpose(0, 1) if cut.is_input else module.weight.detach()
        largest = rows.abs().flatten(1).amax(1)[list(cut.index)]
        (read if cut.is_input else given).scatter_reduce_(0, torch.tensor(cut.root), largest, "amax")
    if not (bool((given > 0).any()) and bool((read > 0).any())):
        return False
    # Both ranges become √(given · read); silent channels stay as they are.
    factor = torch.where((given > 0) & (read > 0), (given / read.clamp_min(1e-12)).sqrt(), torch.ones(()))
    for cut in group.cuts:
        _apply(modules[cut.module], cut, extra * factor[list(cut.root)])
    return True


def _apply(module: Any, cut: Cut, factor: Tensor) -> None:
    """Take the factor out of what gives the channels, and give it to what reads them."""
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

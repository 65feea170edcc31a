"""BatchNorm after a cut: its statistics are those of other channels now."""

from collections.abc import Iterable

import torch
from torch import nn

from autocompress.compress.material import Batch, Call


def settle_batchnorm(model: nn.Module, call: Call, batches: Iterable[Batch]) -> None:
    """Estimate BatchNorm's mean and variance anew as plain averages over `batches`; weights do not change."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    four_d = any(isinstance(m, nn.Conv2d) for m in model.modules())
    if four_d:  # takes three quarters of the time
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    if four_d:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()

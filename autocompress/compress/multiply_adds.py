"""Where a model's arithmetic is: multiply-adds by layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.watched import watched

_COUNTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def multiply_adds(model: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, int]:
    """Multiply-adds of each convolution and linear layer that runs, by name. Looking up an embedding has none.

    What runs outside of such layers (the scores of an attention, torch's own fused attention) is not counted.

    Args:
        call: runs a model on a sample of the task.
    """
    found: dict[str, int] = {}

    def look(name: str, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            weight = module.get_parameter("weight")
            found[name] = found.get(name, 0) + output.numel() * (weight.numel() // len(weight))

    counted = [name for name, module in model.named_modules() if isinstance(module, _COUNTED)]
    with watched(model, counted, look), torch.no_grad():
        call(model)
    return found

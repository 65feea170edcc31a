"""What a model gives, whatever it is held in."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def outputs_of(output: Any) -> list[Tensor]:
    """All floating tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in outputs_of(value)]

"""What a task gives to the stages that train, calibrate and look at accuracy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Batch = Mapping[str, torch.Tensor]
Call = Callable[[nn.Module, Batch], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Data, loss and metric of a task, as the stages use them.

    Attributes:
        call: runs a model on a batch.
        classifies: whether the first output holds class logits.
        loss: the task's own, of a model's outputs and a batch's targets; a scalar. None where the train items have no
            targets that it takes.
        items: of the train split.
        fetch: train items by index: inputs by name, and targets in the task's structure.
        fixed: whether a train item is the same each time it is read (no augmentation).
        calibration: the calibration items with their targets: at most so many, in batches of at most so many.
        validate: the metric of a torch model on the validation split, or a fixed part of it.
        teachers: the task's further teachers, in eval mode.
    """

    call: Call
    classifies: bool
    loss: Callable[[Any, Any], torch.Tensor] | None
    items: int
    fetch: Callable[[Sequence[int]], tuple[dict[str, torch.Tensor], Any]]
    fixed: bool
    calibration: Callable[[int, int], Iterator[tuple[dict[str, torch.Tensor], Any]]]
    validate: Callable[[nn.Module], float]
    teachers: Sequence[nn.Module] = ()

    def orders(self, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
        """Endless batches of `size` train indices: each epoch a new permutation, its remainder left out."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(self.items)
            for start in range(0, max(1, self.items - size + 1), size):
                yield order[start : start + size]

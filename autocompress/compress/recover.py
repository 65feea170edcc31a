"""Recovery: a compressed model learns to answer as the original does (Hinton et al., 2015). No labels are needed."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autocompress.core.errors import StageError

Batch = Mapping[str, torch.Tensor]
Call = Callable[[nn.Module, Batch], Any]
TEMPERATURE = 4.0
LEARNING_RATE = 1e-3


def recover(
    student: nn.Module,
    teacher: nn.Module,
    call: Call,
    batches: Iterator[Batch],
    *,
    steps: int,
    classifies: bool,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train `student` in place for `steps` batches towards the outputs of `teacher`; AdamW, warm-up, cosine.

    Raises:
        StageError: the loss is not finite.
    """
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-4)
    warm_up = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps)))
    )
    student.train()
    for step in range(steps):
        batch = next(batches)
        with torch.no_grad():
            wanted = outputs_of(call(teacher, batch))
        loss = distillation_loss(outputs_of(call(student, batch)), wanted, classifies=classifies)
        if not torch.isfinite(loss):
            raise StageError("recover", f"the distillation loss is {float(loss.detach())} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
    student.eval().requires_grad_(False)


def distillation_loss(got: list[torch.Tensor], wanted: list[torch.Tensor], *, classifies: bool) -> torch.Tensor:
    """KL divergence at a temperature for class logits (classes on axis 1), else squared error over the variance."""
    total = torch.zeros(())
    for g, w in zip(got, wanted, strict=True):
        if classifies and w.ndim >= 2:
            p = F.log_softmax(w / TEMPERATURE, dim=1)
            q = F.log_softmax(g / TEMPERATURE, dim=1)
            total = total + F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean() * TEMPERATURE**2
        else:
            total = total + F.mse_loss(g, w) / w.var(correction=0).clamp_min(1e-6)
    return total


def outputs_of(output: Any) -> list[torch.Tensor]:
    """All floating tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in outputs_of(value)]

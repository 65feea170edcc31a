"""A task that takes milliseconds: images of noise, labelled by the network itself, so that fp32 is always right."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core.measurement import MeasurePlan
from autocompress.core.profile import Profile
from autocompress.core.space import LayerRule, SpaceRules, WidthRule
from autocompress.task import CheckedTask, Task, check_task
from tests import nets

EVERY = ("w8a8", "w7a8", "w4a8", "w8a32", "w4a32", "w16a32")
PROFILE = Profile(
    name="tiny",
    description="milliseconds",
    runtime="onnxruntime",
    format="onnx",
    precisions=dict.fromkeys(("conv2d", "linear"), EVERY),
    width_multiple=4,
    measure=MeasurePlan(warmup_runs=1, warmup_s=0, turn_s=0.001, min_blocks=3, max_duration_s=0.05, processes=2),
)
RULES = SpaceRules(
    name="tiny",
    description="",
    layers=(LayerRule(precisions=("fp32", *EVERY)),),
    widths=(WidthRule(ratios=(1.0, 0.5)),),
    students=(0.5, 0.25, 0.125),
)


class Images:
    """Items `(image, label)` that count how often they were read."""

    def __init__(self, net: nn.Module, inputs: Callable[..., dict[str, Tensor]], items: int, seed: int) -> None:
        (self.images,) = inputs(items, seed=seed).values()
        self.labels = net(self.images).argmax(1)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.images[index], int(self.labels[index])


def student(width: float) -> nn.Module:
    """0.5: a good one; 0.25: one whose outputs no metric accepts; 0.125: one that holds NaN."""
    net = nets.seeded(lambda: nets.Flat(max(width, 0.25)), seed=2)
    if width == 0.25:
        net.fc.weight *= 1e9
    if width == 0.125:
        net.fc.weight.fill_(torch.nan)
    return net


def careful_top1(outputs: Any, targets: Any) -> float:
    """Top-1, and an exception for outputs no network should give."""
    if np.abs(outputs).max() > 1e6:
        raise ValueError("these are no logits")
    return float((outputs.argmax(1) == targets).mean())


def task(
    build: Callable[[], nn.Module] = nets.Flat, inputs: Callable[..., dict[str, Tensor]] = nets.image, **more: Any
) -> CheckedTask:
    """The task of a network, checked."""
    net = nets.seeded(build)
    sizes = {"train": (160, 1), "validation": (96, 2), "test": (64, 3)}
    parts: dict[str, Any] = {name: Images(net, inputs, items, seed) for name, (items, seed) in sizes.items()}
    return check_task(Task(name="tiny", model=lambda: nets.seeded(build), metric=careful_top1, **(parts | more)))

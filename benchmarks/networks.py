"""Networks of the sizes people deploy, with random weights: how fast they are does not depend on training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from autocompress import Task

CLASSES = 1000


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 (He et al., CVPR 2016) for images of 224x224."""
    shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Basic(*shape) for shape in (*shapes, (512, 512, 1))]
    return nn.Sequential(
        nn.Sequential(*stem),
        nn.Sequential(*blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


class Inverted(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 one and a 1x1 one that narrows, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        widen = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()] if expand > 1 else []
        self.layers = nn.Sequential(
            *widen,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (Sandler et al., CVPR 2018) for images of 224x224."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    width, blocks = 32, list[nn.Module]()
    for expand, outputs, count, stride in stages:
        for i in range(count):
            blocks.append(Inverted(width, outputs, stride if i == 0 else 1, expand))
            width = outputs
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    last = nn.Sequential(nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
    head = nn.Linear(1280, CLASSES)
    return nn.Sequential(stem, nn.Sequential(*blocks), last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def settled(build: Callable[[], nn.Module], size: int) -> nn.Module:
    """The network, always with the same random weights, its BatchNorm settled on noise, in eval mode."""
    torch.manual_seed(0)
    net = build().train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, size, size))
    return net.eval()


def task(name: str, build: Callable[[], nn.Module], size: int = 224, items: int = 16) -> Task:
    """A task on noise, which only says how fast something is."""
    images = torch.randn(items, 3, size, size, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, torch.zeros(items, dtype=torch.int64))
    return Task(name=name, model=lambda: settled(build, size), train=data, validation=data)


r18 = task("resnet18", resnet18)
mbv2 = task("mobilenet-v2", mobilenet_v2)

"""A depthwise-separable residual network with ReLU6 and one grouped convolution, on digits of 16x16 pixels."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autocompress import Task


class Separable(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; a residual where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Net(nn.Module):
    """`image` `[batch, 1, 16, 16]` → logits `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.Sequential(Separable(16, 16, 1), Separable(16, 32, 2), Separable(32, 32, 1))
        self.grouped = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.grouped(self.blocks(self.stem(image))).mean((2, 3)))


def data() -> dict[str, TensorDataset]:
    """Every third image is validation; of the rest every fourth is test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    rest = torch.arange(len(labels)) % 6
    parts = {"train": (2, 3, 5), "validation": (0, 4), "test": (1,)}
    masks = {name: torch.isin(rest, torch.tensor(part)) for name, part in parts.items()}
    return {name: TensorDataset(images[mask], labels[mask]) for name, mask in masks.items()}


def model() -> nn.Module:
    net = Net()
    net.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")))
    return net.eval()


task = Task(name="depthwise", model=model, **data())

"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, and a small residual network trained on them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from autocompress.core.extras import require
from autocompress.task import Task

WEIGHTS = Path(__file__).with_name("digits.safetensors")

# The split is by index modulo 9, so no random generator can change it; neighbours in the data share a writer,
# and every part sees every writer. Sizes: 997, 400, 400.
PARTS = {"train": (0, 1, 6, 7, 8), "validation": (2, 3), "test": (4, 5)}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` → `[batch, outputs, h / stride, w / stride]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class DigitsNet(nn.Module):
    """A residual network of three blocks: `image` `[batch, 1, 8, 8]` in 0..1 → logits `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 48, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(48)
        self.blocks = nn.Sequential(Block(48, 48), Block(48, 48), Block(48, 64, stride=2))
        self.fc = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the ten digits."""
        x = self.blocks(functional.relu(self.bn(self.conv(image))))
        logits: Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def split() -> dict[str, TensorDataset]:
    """The images `[1, 8, 8]` and labels, in parts that never change."""
    data = require("sklearn.datasets", "digits").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    rest = torch.arange(len(labels)) % 9
    chosen = {name: torch.isin(rest, torch.tensor(part)) for name, part in PARTS.items()}
    return {name: TensorDataset(images[mask], labels[mask]) for name, mask in chosen.items()}


def model() -> DigitsNet:
    """The network with the weights in the package, in eval mode; `train_digits` made them."""
    net = DigitsNet()
    net.load_state_dict(load_file(WEIGHTS))  # kept in 16 bits; copied into float32
    return net.eval()


def task() -> Task:
    """The built-in task `digits`."""
    parts = split()
    return Task(name="digits", model=model, train=parts["train"], validation=parts["validation"], test=parts["test"])

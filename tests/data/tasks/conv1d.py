"""A one-dimensional convolutional network of two branches, on noisy waves: inputs are a tuple (signal, features)."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress import Task

LENGTH = 64


class Net(nn.Module):
    """`signal` `[batch, 2, 64]` and `features` `[batch, 3]` → logits `[batch, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 24, 5, 1, 2, bias=False), nn.BatchNorm1d(24), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv1d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm1d(24), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(24, 16, 9, 1, 4, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.merge = nn.Sequential(nn.Conv1d(40, 32, 3, 2, 1, bias=False), nn.BatchNorm1d(32), nn.ReLU())
        self.side = nn.Linear(3, 16)
        self.head = nn.Linear(48, 6)

    def forward(self, signal: Tensor, features: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(signal)
        x = self.merge(torch.cat([self.narrow(x), self.wide(x)], 1)).mean(2)
        side = torch.relu(self.side(features))
        return self.head(torch.cat([x, side], 1)) * scale


class Waves(Dataset):
    """Items `((signal, features), class)`: three shapes of wave, each slow or fast."""

    def __init__(self, items: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 6, items)
        phase = rng.uniform(0, 1, (items, 1))
        cycles = np.where(self.labels % 2, 5.0, 3.0)[:, None] + rng.uniform(-0.8, 0.8, (items, 1))
        turn = (np.linspace(0, 1, LENGTH) * cycles + phase) % 1
        waves = np.stack([np.sin(2 * np.pi * turn), np.sign(turn - 0.5), 2 * turn - 1])
        clean = waves[self.labels // 2, np.arange(items)]
        both = np.stack([clean, np.roll(clean, 3, 1)], 1)
        self.signals = (both + rng.normal(0, 0.6, both.shape)).astype(np.float32)
        hints = np.concatenate([cycles + rng.normal(0, 1.0, cycles.shape), phase, rng.normal(size=phase.shape)], 1)
        self.features = hints.astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        inputs = torch.from_numpy(self.signals[index]), torch.from_numpy(self.features[index])
        return inputs, int(self.labels[index])


def data() -> dict[str, Waves]:
    return {"train": Waves(2000, 0), "validation": Waves(400, 1), "test": Waves(400, 2)}


def model() -> nn.Module:
    net = Net()
    net.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")))
    return net.eval()


def task() -> Task:
    return Task(name="conv1d", model=model, **data())

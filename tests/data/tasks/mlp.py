"""A BatchNorm multilayer perceptron on scikit-learn's `make_classification`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import make_classification
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from autocompress import Task


def net() -> nn.Sequential:
    """Table rows `[batch, 24]` → logits `[batch, 4]`."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((24, 96), (96, 64), (64, 32)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def data() -> dict[str, Dataset]:
    rows, labels = make_classification(
        4000, 24, n_informative=12, n_redundant=6, n_classes=4, class_sep=1.6, flip_y=0.01, random_state=0
    )
    table = TensorDataset(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
    bounds = {"train": (0, 3000), "validation": (3000, 3500), "test": (3500, 4000)}
    return {name: Subset(table, range(*bound)) for name, bound in bounds.items()}


def model() -> nn.Module:
    built = net()
    built.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")))
    return built.eval()


def task() -> Task:
    return Task(name="mlp", model=model, **data())

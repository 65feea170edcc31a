"""Train the networks of the task files here: `python tests/data/tasks/train.py [NAME ...]`, three minutes for all."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

FOLDER = Path(__file__).parent
EPOCHS = {"depthwise": 60, "conv1d": 15, "mlp": 30, "transformer": 60}
Loss = Callable[[Tensor, Tensor], Tensor]


def call(net: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, list | tuple) else net(inputs)


def take(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, dict):
        return {name: tensor[rows] for name, tensor in inputs.items()}
    return [tensor[rows] for tensor in inputs] if isinstance(inputs, list | tuple) else inputs[rows]


def train(net: nn.Module, data: Any, loss_of: Loss, epochs: int, batch: int = 64) -> None:
    inputs, targets = default_collate([data[i] for i in range(len(data))])
    steps = epochs * (len(targets) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(targets))
        for start in range(0, len(order) - batch + 1, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            loss_of(call(net, take(inputs, rows)), targets[rows]).backward()
            optimizer.step()
            schedule.step()


def main(names: list[str]) -> None:
    sys.path.insert(0, str(FOLDER))
    for name in names or EPOCHS:
        module = importlib.import_module(name)
        torch.manual_seed(0)
        net = module.net() if hasattr(module, "net") else module.Net()
        train(net, module.data()["train"], getattr(module, "LOSS", functional.cross_entropy), EPOCHS[name])
        save_file(net.state_dict(), FOLDER / f"{name}.safetensors")
        print(name, sum(p.numel() for p in net.parameters()), "parameters")


if __name__ == "__main__":
    main(sys.argv[1:])

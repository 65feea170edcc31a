"""Train the network of the task `digits`: `python -m autocompress.tasks.train_digits [FILE]`, about a minute."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from autocompress.tasks.digits import WEIGHTS, DigitsNet, split

EPOCHS = 30
BATCH = 32


def shift(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel, edges filled with background."""
    padded = functional.pad(images, (1, 1, 1, 1))
    places = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, places, strict=True)])


def train(seed: int = 0) -> DigitsNet:
    """A network trained on the train part alone, with random shifts and a one-cycle learning rate."""
    torch.manual_seed(seed)
    images, labels = split()["train"].tensors
    net = DigitsNet()
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            loss = functional.cross_entropy(net(shift(images[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(net: DigitsNet, part: str) -> float:
    """Top-1 accuracy over a part of the data."""
    images, labels = split()[part].tensors
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, report and write the weights."""
    net = train()
    print(", ".join(f"{part} {accuracy(net, part):.4f}" for part in ("train", "validation", "test")))
    state = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    save_file(state, Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)


if __name__ == "__main__":
    main()

"""Two public tasks on Fashion-MNIST beside the ResNet: a small MobileNet and a small transformer.

    autocompress search benchmarks/fashion.py:depthwise --target cpu-onnxruntime
    autocompress search benchmarks/fashion.py:transformer --target cpu-onnxruntime

Each is trained once, on first use, from a seed, which takes a few minutes of one core; the weights are kept in
`runs/tasks`. The images are those of Debian's dataset-fashion-mnist, in the splits of the ResNet's task: 55,000 to
train on, 5,000 to validate on, 10,000 to test on.

    python benchmarks/fashion.py        # trains what is missing, and says how good it is
"""

import gzip
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from autocompress import Task
from benchmarks.networks import Inverted

IMAGES = Path("/usr/share/datasets/fashion-mnist")
WEIGHTS = Path(__file__).parents[1] / "runs" / "tasks"
TRAINED_ON, CLASSES, BATCH = 55_000, 10, 256
WIDTH, HEADS, PATCH, ENCODERS = 64, 4, 4, 2


class MobileNet(nn.Module):
    """`image` `[batch, 1, 28, 28]` → logits `[batch, 10]`: inverted residuals around depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        shapes = [(24, 32, 2), (32, 32, 1), (32, 48, 1), (48, 48, 1), (48, 80, 2), (80, 80, 1)]
        self.layers = nn.Sequential(*(Inverted(*shape, expand=4) for shape in shapes))
        self.last = nn.Sequential(nn.Conv2d(80, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6())
        self.fc = nn.Linear(160, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.last(self.layers(self.stem(image)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention of several heads, written with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (layer(x).view(batch, length, self.num_heads, -1) for layer in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        return mixed


class Encoder(nn.Module):
    """Attention and two linear layers, each after a LayerNorm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        found: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return found


class Transformer(nn.Module):
    """`image` `[batch, 1, 28, 28]` → logits `[batch, 10]`: 49 patches of 4x4 and two encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(torch.randn((28 // PATCH) ** 2, WIDTH) * 0.02)
        self.layers = nn.ModuleList(Encoder() for _ in range(ENCODERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(self.norm(x).mean(1))
        return logits


def read(name: str, header: int) -> np.ndarray:
    """The bytes of one of the data set's files after its header."""
    path = IMAGES / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: apt-get install dataset-fashion-mnist")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def part(name: str, rows: slice = slice(None)) -> TensorDataset:
    """Images `[1, 28, 28]`, scaled, and labels, of `train` or `t10k`."""
    x = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[rows]
    y = read(f"{name}-labels-idx1-ubyte.gz", 8)[rows].astype(np.int64)
    return TensorDataset(torch.from_numpy((x.astype(np.float32) / 255 - 0.2860) / 0.3530), torch.from_numpy(y))


def augmented(images: Tensor, shift: int) -> Tensor:
    """Images flipped at random, and all of them shifted by up to so many pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    y, x = (int(torch.randint(0, 2 * shift + 1, ())) for _ in range(2))
    return functional.pad(images, (shift,) * 4, mode="replicate")[:, :, y : y + 28, x : x + 28]


def fit(model: nn.Module, data: TensorDataset, *, epochs: int, rate: float, shift: int) -> None:
    """Train in place with AdamW and one cycle of the learning rate."""
    images, labels = data.tensors
    model.to(memory_format=torch.channels_last)  # depthwise convolutions then take half the time
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images))[: steps * BATCH].view(-1, BATCH):
            loss = functional.cross_entropy(
                model(augmented(images[rows], shift).contiguous(memory_format=torch.channels_last)), labels[rows]
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    model.eval()


def trained(name: str, build: Callable[[], nn.Module], *, epochs: int, rate: float, shift: int) -> nn.Module:
    """The network with its weights, in eval mode; they are made where they are not there yet."""
    path = WEIGHTS / f"fashion-{name}.safetensors"
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        if not path.exists():
            torch.set_num_threads(1)  # so that the weights do not depend on the number of cores
            fit(model, part("train", slice(0, TRAINED_ON)), epochs=epochs, rate=rate, shift=shift)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {n: t.contiguous() for n, t in model.state_dict().items()},
                temporary := path.with_suffix(f".{os.getpid()}"),
            )
            temporary.replace(path)
            torch.set_num_threads(threads)
    model.load_state_dict(load_file(path))
    return model.eval()


def task_of(name: str, build: Callable[[], nn.Module]) -> Task:
    """The task of a network."""
    return Task(
        name=f"fashion-{name}",
        model=build,
        train=part("train", slice(0, TRAINED_ON)),
        validation=part("train", slice(TRAINED_ON, None)),
        test=part("t10k"),
    )


def depthwise() -> Task:
    """The MobileNet."""
    return task_of("depthwise", lambda: trained("depthwise", MobileNet, epochs=5, rate=0.006, shift=2))


def transformer() -> Task:
    """The transformer."""
    return task_of("transformer", lambda: trained("transformer", Transformer, epochs=8, rate=0.005, shift=0))


def main() -> None:
    """Train what is missing; print test accuracies."""
    for make in (depthwise, transformer):
        task, begin = make(), time.perf_counter()
        model = task.model()
        images, labels = part("t10k").tensors
        with torch.no_grad():
            found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
        right, count = float((found == labels).float().mean()), sum(p.numel() for p in model.parameters())
        print(f"{task.name}: {count:,} parameters, test {right:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""A two-layer transformer that predicts a number from padded tokens: dict inputs, R² as the metric."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from autocompress import Task

TOKENS, LENGTH, WIDTH, HEADS = 24, 20, 48, 4
LOSS = functional.mse_loss
NEGATE = 1  # this token turns the sign of the one after it; 0 is padding


class Attention(nn.Module):
    """Multi-head self-attention over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(mask[:, None, None, :] == 0, -1e4).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    """`tokens` and `mask` `[batch, 20]` → one number an item, `[batch, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.3)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask[:, :, None].to(x.dtype)
        return self.head((self.norm(x) * weights).sum(1) / weights.sum(1))


class Sentences(Dataset):
    """Items `({tokens, mask}, [mood])`: the mean worth of the words, where NEGATE turns the word after it."""

    def __init__(self, items: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        worth = np.linspace(-1, 1, TOKENS)
        worth[: NEGATE + 1] = 0
        tokens = rng.integers(2, TOKENS, (items, LENGTH))
        tokens[rng.random(tokens.shape) < 0.25] = NEGATE
        mask = np.arange(LENGTH) < rng.integers(5, LENGTH + 1, (items, 1))
        tokens[~mask] = 0
        sign = np.ones(tokens.shape)
        sign[:, 1:][tokens[:, :-1] == NEGATE] = -1
        mood = (worth[tokens] * sign).sum(1) / mask.sum(1)
        self.tokens, self.mask = torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))
        self.mood = torch.tensor(mood * 5, dtype=torch.float32)[:, None]

    def __len__(self) -> int:
        return len(self.mood)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"tokens": self.tokens[index], "mask": self.mask[index]}, self.mood[index]


def r2(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Share of the targets' variance that the outputs explain; 1 is perfect."""
    return float(1 - ((outputs - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


def data() -> dict[str, Sentences]:
    return {"train": Sentences(4000, 0), "validation": Sentences(400, 1), "test": Sentences(400, 2)}


def model() -> nn.Module:
    net = Net()
    net.load_state_dict(load_file(Path(__file__).with_suffix(".safetensors")))
    return net.eval()


def task() -> Task:
    return Task(name="transformer", model=model, metric=r2, loss=LOSS, **data())

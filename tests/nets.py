"""Small networks of every kind that can be compressed, and some that cannot. Weights and BatchNorm are seeded."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = Mapping[str, Tensor]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in eval mode whose BatchNorm layers do something: none has the mean 0 and variance 1 of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build()
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.uniform_(-0.5, 0.5)
                    module.running_var.uniform_(0.3, 2.0)
    return net.eval().requires_grad_(False)


def image(batch: int = 2, channels: int = 3, size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Normal noise `[batch, channels, size, size]`, as `x`."""
    return {"x": torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))}


def positional(net: nn.Module, batch: Inputs) -> Any:
    """Call a network that takes its inputs in order."""
    return net(*batch.values())


def by_name(net: nn.Module, batch: Inputs) -> Any:
    """Call a network that takes its inputs by name."""
    return net(**batch)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, twice, the second time with a 1x1 convolution; pools and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 24, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(16, 32, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.short = nn.Conv2d(16, 32, 1, bias=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = self.pool(x)
        x = F.relu(self.bn3(self.conv3(x)) + self.short(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Separable(nn.Module):
    """Pointwise, depthwise and grouped convolutions with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.grouped = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=4), nn.BatchNorm2d(32), nn.ReLU6())
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.grouped(self.pointwise(self.depthwise(self.stem(x)))).mean((2, 3)))


class Flat(nn.Module):
    """A convolution whose channels are flattened into a Linear with BatchNorm1d. `width` makes a smaller one."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels, hidden = int(8 * width), int(24 * width)
        self.conv = nn.Conv2d(3, channels, 3, 2, 1)
        self.up = nn.Linear(channels * 4 * 4, hidden)
        self.bn = nn.BatchNorm1d(hidden)
        self.fc = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.up(F.relu(self.conv(x)).flatten(1)))))


class Branches(nn.Module):
    """One-dimensional convolutions of two branches that are concatenated, and a second input: a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 16, 5, 1, 2, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv1d(16, 16, 3, 1, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(16, 8, 9, 1, 4), nn.ReLU())
        self.merge = nn.Sequential(nn.Conv1d(24, 16, 3, 2, 1, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.side = nn.Linear(3, 8)
        self.fc = nn.Linear(24, 6)

    def forward(self, signal: Tensor, features: Tensor) -> Tensor:
        x = self.stem(signal)
        x = self.merge(torch.cat([self.narrow(x), self.wide(x)], 1)).mean(2)
        return self.fc(torch.cat([x, F.relu(self.side(features))], 1))


def waves(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of Branches."""
    rng = torch.Generator().manual_seed(seed)
    return {"signal": torch.randn(batch, 2, 32, generator=rng), "features": torch.randn(batch, 3, generator=rng)}


def perceptron() -> nn.Module:
    """Linear, BatchNorm1d and ReLU, on 12 numbers."""
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def rows(batch: int = 2, width: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Normal noise `[batch, width]`, as `input`."""
    return {"input": torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))}


class Encoder(nn.Module):
    """One transformer layer written with q/k/v Linears; dict inputs, a dict of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, 16)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.tokens(tokens)
        y = self.norm1(x)
        batch, length, _ = y.shape
        q, k, v = (layer(y).view(batch, length, 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(mask[:, None, None, :] == 0, -1e4).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        pooled = self.norm(x).mean(1)
        return {"logits": self.head(pooled), "pooled": pooled}


def sentences(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of Encoder."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 24, (batch, 10), generator=rng)
    return {"tokens": tokens, "mask": (torch.rand(batch, 10, generator=rng) < 0.8).long()}


class Baked(nn.Module):
    """Its reshape spells out the channels, so that an exported graph fits one width only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.fc(y.reshape(y.shape[0], y.shape[1], -1).mean(2))


class OneByOne(nn.Module):
    """Takes a batch apart, so that its size cannot be free."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(torch.cat([row[None] for row in input]))


class Undecided(nn.Module):
    """What it does depends on the values it sees: nothing that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(input) if input.sum() > 0 else -self.fc(input)


class Odd(nn.Module):
    """Layers that must be left alone, one of each kind, between two that need not be."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, 16)
        self.first = nn.Linear(16, 16)
        self.twice = nn.Linear(16, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.unused = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.decoder = nn.Linear(16, 24, bias=False)
        self.decoder.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.first(self.tokens(tokens)))))
        x, _ = self.lstm(x)
        x = self.normed(x) * self.scale
        return self.decoder(x + self.down(F.relu(self.up(x)))).mean(1)


CASES: Mapping[
    str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]], Callable[[nn.Module, Inputs], Any]]
]
CASES = {
    "residual": (Residual, image, positional),
    "separable": (Separable, image, positional),
    "flat": (Flat, image, positional),
    "branches": (Branches, waves, positional),
    "perceptron": (perceptron, rows, positional),
    "encoder": (Encoder, sentences, by_name),
}

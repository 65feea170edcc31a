"""What a compressed model learns from its teachers: their outputs, their features, or where they attend."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.material import Batch, Call
from autocompress.compress.outputs import outputs_of
from autocompress.compress.watched import watched
from autocompress.core.errors import StageError

CACHE_BYTES = 256_000_000  # answers of one teacher that are kept at most
POINTS = 4  # places in the model whose features are compared
ATTENTION = 1000.0  # weight of attention transfer, as in its paper
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def output_loss(got: Sequence[Tensor], wanted: Sequence[Tensor], *, classifies: bool, temperature: float) -> Tensor:
    """KL divergence at a temperature for class logits, else squared error over the variance, of all outputs together.

    Class logits are in the first output, classes on axis 1, where the model classifies; their divergence is scaled by
    the squared temperature (Hinton et al., Distilling the Knowledge in a Neural Network, 2015).
    """
    total = got[0].new_zeros(())
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if classifies and i == 0 and w.ndim >= 2:
            p = F.log_softmax(w / temperature, dim=1)
            q = F.log_softmax(g / temperature, dim=1)
            total = total + F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean() * temperature**2
        else:
            total = total + F.mse_loss(g, w) / w.var(correction=0).clamp_min(1e-6)
    return total


def agreed(answers: Sequence[Sequence[Tensor]], *, classifies: bool, confident: bool) -> list[Tensor]:
    """One answer of several teachers: mean probabilities for class logits, as log-probabilities, else the mean.

    With `confident`, each teacher of class logits counts for an item as exp(−entropy) of what it says.
    """
    if len(answers) == 1:
        return list(answers[0])
    merged = []
    for i, given in enumerate(zip(*answers, strict=True)):
        if not (classifies and i == 0 and given[0].ndim >= 2):
            merged.append(torch.stack(list(given)).mean(0))
            continue
        logs = torch.stack([F.log_softmax(g, dim=1) for g in given])
        sure = (logs.exp() * logs).sum(2, keepdim=True).exp() if confident else torch.ones_like(logs[:, :, :1])
        merged.append((logs.exp() * sure / sure.sum(0)).sum(0).clamp_min(1e-12).log())
    return merged


class Answers:
    """A teacher's outputs for train items, each computed once where the items are fixed.

    They are kept as float32, in memory and, with `folder`, on disk: candidates share them.
    """

    def __init__(self, teacher: nn.Module, call: Call, items: int, *, fixed: bool, folder: Path | None) -> None:
        self._teacher = teacher
        self._call = call
        self._items = items
        self._fixed = fixed
        self._path = None if folder is None or not fixed else folder / f"{_digest(teacher, items)}.npz"
        self._known = np.zeros(items, bool)
        self._kept: list[NDArray[np.float32]] | None = None
        self._new = False
        if self._path is not None and self._path.exists():
            with np.load(self._path, allow_pickle=False) as file:
                self._known = file["known"]
                self._kept = [file[f"output_{i}"] for i in range(len(file.files) - 1)]

    def __call__(self, rows: NDArray[np.int64], batch: Batch) -> list[Tensor]:
        """Outputs for the train items `rows`, whose inputs are `batch`."""
        if not self._fixed:
            return self._run(batch)
        missing = ~self._known[rows]
        if self._kept is None or missing.any():
            some = torch.from_numpy(missing)
            part = batch if missing.all() else {name: tensor[some] for name, tensor in batch.items()}
            given = self._run(part)
            if not self._keep(rows[missing], given):
                return given if missing.all() else self._run(batch)
        assert self._kept is not None
        device = next(iter(batch.values())).device
        return [torch.from_numpy(kept[rows]).to(device) for kept in self._kept]

    def save(self) -> None:
        """Write what is new."""
        if self._path is None or self._kept is None or not self._new:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.npz")
        kept: dict[str, Any] = {f"output_{i}": array for i, array in enumerate(self._kept)}
        np.savez(temporary, known=self._known, **kept)
        temporary.replace(self._path)
        self._new = False

    def _run(self, batch: Batch) -> list[Tensor]:
        with torch.no_grad():
            return outputs_of(self._call(self._teacher, batch))

    def _keep(self, rows: NDArray[np.int64], given: Sequence[Tensor]) -> bool:
        """Whether there is room for them."""
        if self._kept is None:
            if sum(4 * self._items * g[0].numel() for g in given) > CACHE_BYTES:
                self._fixed = False
                return False
            self._kept = [np.zeros((self._items, *g.shape[1:]), np.float32) for g in given]
        for kept, g in zip(self._kept, given, strict=True):
            kept[rows] = g.float().cpu().numpy()
        self._known[rows] = True
        self._new = True
        return True


def _digest(teacher: nn.Module, items: int) -> str:
    found = hashlib.sha256(str(items).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Features:
    """Compares what teacher and student compute on the way, at a few places that both have by name.

    Attributes:
        points: names of these modules.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, call: Call, batch: Batch, *, attention: bool) -> None:
        """`batch` is a sample.

        Raises:
            StageError: there is no place to compare.
        """
        self._call = call
        self._teacher = teacher
        self._attention = attention
        self.points = _points(student, teacher, call, batch)
        if not self.points:
            raise StageError(
                "recover", "teacher and student have no modules of one name whose features compare: use kind: logits"
            )
        self._seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        self._handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, who=who, name=name: self._seen[who].__setitem__(name, output)
            )
            for who, model in (("student", student), ("teacher", teacher))
            for name in self.points
        ]
        self._axes = {name: _channel_axis(teacher.get_submodule(name)) for name in self.points}
        with torch.no_grad():
            call(teacher, batch)
            call(student, batch)
        self._projections = nn.ModuleDict()
        if not attention:
            for name in self.points:
                mine, theirs = (self._seen[who][name].shape[self._axes[name]] for who in ("student", "teacher"))
                if mine != theirs:
                    self._projections[name.replace(".", "/")] = nn.Linear(mine, theirs)
        self._projections.to(next(iter(batch.values())).device)

    def parameters(self) -> list[nn.Parameter]:
        """Of the projections, to train with the student's."""
        return list(self._projections.parameters())

    def answers(self, batch: Batch) -> list[Tensor]:
        """The teacher's outputs; its features are remembered."""
        with torch.no_grad():
            return outputs_of(self._call(self._teacher, batch))

    def loss(self) -> Tensor:
        """Of the forward passes that student and teacher have just made."""
        total: Tensor = torch.zeros(())
        for name in self.points:
            mine, theirs = (self._seen[who][name] for who in ("student", "teacher"))
            mine, theirs = (f.float().movedim(self._axes[name], -1) for f in (mine, theirs.detach()))
            mine = _resized(mine, theirs)
            if self._attention:
                wrong = ATTENTION * (_map(mine) - _map(theirs)).square().mean()
            else:
                key = name.replace(".", "/")
                projected = self._projections[key](mine) if key in self._projections else mine
                wrong = F.mse_loss(projected, theirs) / theirs.var(correction=0).clamp_min(1e-6)
            total = total.to(wrong.device) + wrong / len(self.points)
        return total

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _map(features: Tensor) -> Tensor:
    """Where features are large: mean square over channels, each item's map of length one, `[items, places]`."""
    return F.normalize(features.square().mean(-1).flatten(1), dim=1)


def _resized(mine: Tensor, theirs: Tensor) -> Tensor:
    """The student's places averaged to the teacher's where there are others; channels are last."""
    places = theirs.shape[1:-1]
    if mine.shape[1:-1] == places:
        return mine
    channels = mine.movedim(-1, 1)
    pooled = F.adaptive_avg_pool1d(channels, places[0]) if len(places) == 1 else F.adaptive_avg_pool2d(channels, places)  # type: ignore[arg-type]
    return pooled.movedim(1, -1)


def _points(student: nn.Module, teacher: nn.Module, call: Call, batch: Batch) -> tuple[str, ...]:
    """Modules of both, evenly spread: blocks where there are some, else layers; none within another."""
    ran = [_shapes(model, call, batch) for model in (student, teacher)]
    both = [n for n, shape in ran[1].items() if n in ran[0] and 3 <= len(shape) == len(ran[0][n]) <= 4]
    held = {n: sum(isinstance(m, _WEIGHTED) for m in teacher.get_submodule(n).modules()) for n in both}
    blocks = [
        n for n in both if held[n] > 1 and not any(o != n and o.startswith(f"{n}.") and held[o] > 1 for o in both)
    ]
    found = blocks or [n for n in both if held[n] == 1 and not list(teacher.get_submodule(n).children())]
    chosen = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(POINTS, len(found)))})
    return tuple(found[i] for i in chosen)


def _shapes(model: nn.Module, call: Call, batch: Batch) -> dict[str, torch.Size]:
    """Output shapes of the modules that give one tensor and run once, in the order they end."""
    seen: dict[str, torch.Size | None] = {}

    def look(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen[name] = output.shape if isinstance(output, Tensor) and name not in seen else None

    with watched(model, [name for name, _ in model.named_modules() if name], look), torch.no_grad():
        call(model, batch)
    return {name: shape for name, shape in seen.items() if shape is not None}


def _channel_axis(module: nn.Module) -> int:
    """1 after a convolution, the last after a linear layer or a norm of the last axis."""
    layers = [m for m in module.modules() if isinstance(m, (*_WEIGHTED, nn.LayerNorm, nn.Embedding))]
    return 1 if layers and isinstance(layers[-1], nn.Conv1d | nn.Conv2d) else -1

"""What a user brings, a trained model, data and a metric: loaded by reference, and checked once for all stages."""

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

from autocompress.core.errors import StageError, TaskError
from autocompress.tasks.items import (
    Items,
    Split,
    Structure,
    blame,
    describe,
    input_leaf,
    plain,
    read_item,
    said,
    specs_of,
    target_leaf,
)
from autocompress.tasks.load import load_object

BUILT_IN = {"digits": "autocompress.tasks.digits"}
CALIBRATION_ITEMS = 512
_PROBED = 32  # items on which a task's metric and loss are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model to compress, with the data and the metric that judge it.

    A data set is indexable, has a length, and its items are `(inputs, target)`:
    inputs are a tensor, a tuple of tensors or a dict of tensors, without a batch dimension;
    a target is a number or a tensor (or a tuple or dict of them).

    Attributes:
        name: letters, digits, `.`, `_` and `-`.
        model: builds the trained model.
        train: items to recover accuracy with.
        validation: items that score the candidates.
        test: items that the search never sees.
        calibration: items that give activation ranges; by default a seeded random sample of `train`.
        metric: `f(outputs, targets)` in numpy, over all items at once; higher is better. By default top-1 accuracy.
        loss: `g(outputs, targets)` in tensors, a scalar. By default cross-entropy.
        student: builds a trained, narrower model of the same inputs and outputs for a width in (0, 1].
        teachers: build further models to distil from.
    """

    name: str
    model: Callable[[], nn.Module]
    train: Items
    validation: Items
    test: Items | None = None
    calibration: Items | None = None
    metric: Callable[[Any, Any], float] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    student: Callable[[float], nn.Module] | None = None
    teachers: Sequence[Callable[[], nn.Module]] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(self.name)):
            raise TaskError(f"`name` must be letters, digits, '.', '_' or '-', got {self.name!r}")
        if isinstance(self.model, nn.Module) or not callable(self.model):
            got = type(self.model).__name__
            raise TaskError(f"`model` must be a function that builds the model, such as lambda: net, got a {got}")
        for name in ("metric", "loss", "student"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TaskError(f"`{name}` must be a function, got {getattr(self, name)!r}")
        teachers: object = self.teachers
        if not isinstance(teachers, Sequence) or not all(callable(teacher) for teacher in teachers):
            raise TaskError(f"`teachers` must be a list of functions that build models, got {self.teachers!r}")
        for name in ("train", "validation", "test", "calibration"):
            data = getattr(self, name)
            if data is None and name in ("test", "calibration"):
                continue
            if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
                raise TaskError(f"`{name}` must be indexable and have a length, got {type(data).__name__}")
            if len(data) == 0:
                raise TaskError(f"`{name}` has no items")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTask:
    """A task whose model ran on its data, and whose metric and loss gave finite numbers.

    Attributes:
        model: built once, in eval mode, on the CPU. Not to be changed: copy it.
        inputs, outputs: how the model's tensors are held together, and their names.
        splits: by name: train, validation, calibration, and test where the task has one.
    """

    task: Task
    model: nn.Module
    inputs: Structure
    outputs: Structure
    splits: Mapping[str, Split]
    _targets: dict[str, dict[str, np.ndarray]] = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Input names in the task's order: forward's parameter names, or the keys of the dict."""
        return self.inputs.names

    def call(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """`model`'s output for a batch by input name; gradients as the caller set them."""
        return self.inputs.call(model, inputs)

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            TaskError: the task has no such split.
        """
        if name not in self.splits:
            raise TaskError(f"task {self.task.name!r} has no {name} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def batch(self, split: str, indices: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
        """Items stacked: inputs by name, and targets in the task's structure."""
        part = self.split(split)
        inputs, targets = part.rows(indices)
        return inputs, part.targets.build(targets)

    def write_split(self, split: str, folder: Path) -> int:
        """Write `<folder>/<input name>.npy`, first axis = items, and keep the targets; returns the number of items."""
        part = self.split(split)
        self._targets[split] = part.write(folder)
        return len(part)

    def targets(self, split: str) -> Any:
        """All targets of a split, stacked, as numpy arrays in the task's structure."""
        part = self.split(split)
        if split not in self._targets:
            chunks = [targets for _, _, targets in part.chunks()]
            self._targets[split] = {n: np.concatenate([c[n].numpy() for c in chunks]) for n in part.targets.names}
        return part.targets.build(self._targets[split])

    def flatten_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """The model's outputs by name: `output`, or `output_0`, `output_1`, …, or the keys of a dict."""
        return self.outputs.flatten(outputs)

    def unflatten(self, outputs: Mapping[str, Any]) -> Any:
        """Outputs by name, in the structure that the model returns and the metric expects."""
        return self.outputs.build(outputs)

    def metric(self, outputs: Any, targets: Any) -> float:
        """The metric over numpy outputs in the model's structure (see `unflatten`); higher is better.

        Raises:
            StageError: in stage "score": the metric raises, or is not a finite number.
        """
        try:
            value = float((self.task.metric or top1)(outputs, targets))
        except Exception as error:  # the user's metric may raise anything
            raise StageError("score", f"the metric raises {said(error)}") from error
        if not math.isfinite(value):
            raise StageError("score", f"the metric gives {value}, not a finite number")
        return value

    @property
    def by_item(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """For each item a figure whose mean is the metric; None for a metric that is the user's own."""
        return hits if self.task.metric is None else None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss over tensors, outputs as the model returned them."""
        return (self.task.loss or cross_entropy)(outputs, targets)


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, names and shapes included, hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hits(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each item 1.0 where its largest output stands at the target's index, else 0.0."""
    found: np.ndarray = (np.argmax(outputs, axis=1) == targets).astype(np.float64)
    return found


def top1(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Share of items whose largest output stands at the target's index."""
    return float(np.mean(hits(outputs, targets)))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits, against class labels of any integer type or class probabilities."""
    return functional.cross_entropy(outputs, targets if targets.is_floating_point() else targets.long())


def load_task(ref: str) -> Task:
    """The task that `ref` names: a built-in name, `file.py`, `file.py:name` or `module:name`.

    Raises:
        TaskError: there is no such task, or its own code raises.
    """
    return load_object(ref, Task, BUILT_IN)


def check_task(task: Task) -> CheckedTask:
    """Build the model, run it on the data, and try metric and loss.

    Raises:
        TaskError: the first fault found, in one sentence.
    """
    with blame("`model` fails to build"):
        model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"`model` must return a torch.nn.Module, got {type(model).__name__}")
    model = model.cpu().eval()
    value, target = read_item(task.train, 0, "train")
    inputs = _name_inputs(model, value)
    targets = Structure.of(target, "target")
    first = {n: input_leaf(v) for n, v in inputs.flatten(value).items()}
    specs = specs_of(first) + specs_of({n: target_leaf(v) for n, v in targets.flatten(target).items()})
    data = {"train": task.train, "validation": task.validation, "test": task.test, "calibration": _calibration(task)}
    splits = {
        name: Split(name=name, data=items, inputs=inputs, targets=targets, specs=specs)
        for name, items in data.items()
        if items is not None
    }
    for split in splits.values():
        split.rows(_spread(len(split), 8))
    outputs = _run_first(model, inputs, first)
    checked = CheckedTask(task=task, model=model, inputs=inputs, outputs=outputs, splits=splits)
    _check_scores(checked)
    return checked


def _name_inputs(model: nn.Module, value: Any) -> Structure:
    """The structure of an item's inputs; a tensor and a tuple are named by forward's parameters."""
    found = Structure.of(value, "input")
    if found.kind == "dict":
        return found
    with blame("the parameters of the model's forward cannot be read"):
        parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(names) < len(found.names):
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise TaskError(f"an item has {len(found.names)} inputs, but the model's forward takes {len(names)}")
        names = list(found.names)
    return Structure(kind=found.kind, names=tuple(names[: len(found.names)]))


def _calibration(task: Task) -> Items:
    """The calibration data: the task's own, else a seeded random sample of `train`, since data is often ordered."""
    if task.calibration is not None:
        return task.calibration
    chosen = np.random.default_rng(0).permutation(len(task.train))[:CALIBRATION_ITEMS]
    return Subset(task.train, sorted(chosen.tolist()))  # type: ignore[arg-type]  # any indexable will do


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spread, first and last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def _run_first(model: nn.Module, inputs: Structure, first: Mapping[str, Tensor]) -> Structure:
    """Run the model on one item; the structure of its outputs."""
    with blame(f"the model fails on the first item, a batch of 1 of {describe(specs_of(first))}"), torch.no_grad():
        raw = inputs.call(model, {name: leaf[None] for name, leaf in first.items()})
    outputs = Structure.of(raw, "output")
    for name, leaf in outputs.flatten(raw).items():
        if not isinstance(leaf, Tensor):
            raise TaskError(f"the model must return tensors, but its {name} is a {type(leaf).__name__}")
        if name in inputs.names:
            raise TaskError(f"the model has an input and an output named {name!r}: rename one of them")
    return outputs


def _check_scores(checked: CheckedTask) -> None:
    """A small batch of validation goes through model, metric and loss."""
    indices = _spread(len(checked.split("validation")), _PROBED)
    batch, targets = checked.batch("validation", indices)
    with blame(f"the model fails on a batch of {len(indices)}"), torch.no_grad():
        outputs = checked.call(checked.model, batch)
    for name, leaf in checked.flatten_outputs(outputs).items():
        if leaf.ndim == 0 or len(leaf) != len(indices):
            raise TaskError(
                f"the model's {name} must have one row an item, but {len(indices)} items gave {list(leaf.shape)}"
            )
        if leaf.isnan().any():
            raise TaskError(f"the model's {name} is NaN on the task's own validation items")
    if checked.task.metric is None:
        _check_default_metric(outputs, targets)
    arrays = checked.unflatten({n: plain(t).numpy() for n, t in checked.flatten_outputs(outputs).items()})
    wanted = {n: t.numpy() for n, t in checked.split("validation").targets.flatten(targets).items()}
    try:
        checked.metric(arrays, checked.split("validation").targets.build(wanted))
    except StageError as error:
        raise TaskError(f"on {len(indices)} validation items {error}") from error
    hint = "" if checked.task.loss else " (cross-entropy is the default; give the task its own `loss`)"
    with blame(f"on {len(indices)} validation items the loss fails{hint}"), torch.no_grad():
        loss: object = checked.loss(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite().all():
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else repr(loss)
        raise TaskError(f"`loss` must give a finite scalar tensor, got {got}{hint}")


def _check_default_metric(outputs: Any, targets: Any) -> None:
    """Top-1 needs one row of class scores an item and integer labels."""
    way_out = "give the task a metric=f(outputs, targets) -> float, higher is better"
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype is torch.bool:
        got = str(targets.dtype).removeprefix("torch.") if isinstance(targets, Tensor) else type(targets).__name__
        raise TaskError(f"top-1 accuracy, the default metric, needs integer class labels, got {got} targets: {way_out}")
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.argmax(1).shape != targets.shape:
        got = str(list(outputs.shape)) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise TaskError(
            f"top-1 accuracy, the default metric, needs one score a class and item, "
            f"got outputs of {got} for targets of {list(targets.shape)}: {way_out}"
        )

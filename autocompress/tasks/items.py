"""Items of a data set: how their tensors are held together, how they are stacked, and how a split becomes files."""

import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from autocompress.core.artifact import TensorSpec
from autocompress.core.errors import AutocompressError, TaskError

CHUNK = 64  # items held in memory at once while a split is written: 38 MB of 224x224 images
_OURS = (str(Path(__file__).parent.parent), *(sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib")))


class Items(Protocol):
    """A data set with a length: each item is `(inputs, target)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """How tensors are held together (alone, in a tuple or in a dict), and the name of each, in order."""

    kind: Literal["tensor", "tuple", "dict"]
    names: tuple[str, ...]

    @classmethod
    def of(cls, value: Any, name: str) -> "Structure":
        """The structure of `value`: one leaf is `name`, the leaves of a tuple are `name_0`, `name_1`, …"""
        if isinstance(value, Mapping | list | tuple) and not value:
            raise TaskError(f"there is no {name} in an empty {type(value).__name__}")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not key.isidentifier():
                    raise TaskError(
                        f"a dict of {name}s must have plain names as keys (letters, digits, _), got {key!r}"
                    )
            return cls(kind="dict", names=tuple(value))
        if isinstance(value, list | tuple):
            return cls(kind="tuple", names=tuple(f"{name}_{i}" for i in range(len(value))))
        return cls(kind="tensor", names=(name,))

    def flatten(self, value: Any) -> dict[str, Any]:
        """The leaves of `value` by name."""
        found = Structure.of(value, "value")
        if found.kind != self.kind or len(found.names) != len(self.names):
            raise TaskError(f"expected a {self.kind} of {len(self.names)}, got a {found.kind} of {len(found.names)}")
        if self.kind == "dict":
            if set(value) != set(self.names):
                raise TaskError(f"expected the keys {sorted(self.names)}, got {sorted(value)}")
            return {name: value[name] for name in self.names}
        return dict(zip(self.names, value if self.kind == "tuple" else (value,), strict=True))

    def build(self, leaves: Mapping[str, Any]) -> Any:
        """What `flatten` took apart, from leaves by name."""
        if self.kind == "dict":
            return {name: leaves[name] for name in self.names}
        values = tuple(leaves[name] for name in self.names)
        return values if self.kind == "tuple" else values[0]

    def call(self, function: Callable[..., Any], leaves: Mapping[str, Any]) -> Any:
        """`function` of one argument, of positional ones for a tuple, of keyword ones for a dict."""
        value = self.build(leaves)
        if self.kind == "dict":
            return function(**value)
        return function(*value) if self.kind == "tuple" else function(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One part of a task's data, all of whose items have the dtypes and shapes of `specs` (no batch dimension)."""

    name: str
    data: Items
    inputs: Structure
    targets: Structure
    specs: tuple[TensorSpec, ...]

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Items stacked along a new first axis: inputs by name, targets by name.

        Raises:
            TaskError: an item cannot be read, or differs from the first one in structure, dtype or shape.
        """
        data, where = _behind_subsets(self.data, indices)
        if type(data) is TensorDataset and len(data.tensors) == 2 and self._is_plain():
            x, y = (plain(take(tensor, where)) for tensor in data.tensors)  # a loop over items would take seconds
            self._check(where[0], {self.inputs.names[0]: x[0]}, {self.targets.names[0]: y[0]})
            return {self.inputs.names[0]: x}, {self.targets.names[0]: y}
        items = [self._item(index) for index in indices]
        inputs = {name: torch.stack([item[0][name] for item in items]) for name in self.inputs.names}
        return inputs, {name: torch.stack([item[1][name] for item in items]) for name in self.targets.names}

    def chunks(self) -> Iterator[tuple[slice, dict[str, Tensor], dict[str, Tensor]]]:
        """All items in order, a few at a time: where they stand, their inputs and targets by name."""
        for start in range(0, len(self), CHUNK):
            where = slice(start, min(start + CHUNK, len(self)))
            yield where, *self.rows(range(where.start, where.stop))

    def _is_plain(self) -> bool:
        return self.inputs.kind == self.targets.kind == "tensor"

    def _item(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value, target = read_item(self.data, index, self.name)
        try:
            inputs = {n: input_leaf(v) for n, v in self.inputs.flatten(value).items()}
            targets = {n: target_leaf(v) for n, v in self.targets.flatten(target).items()}
        except TaskError as error:
            raise TaskError(f"item {index} of `{self.name}` is not like the first of `train`: {error}") from error
        self._check(index, inputs, targets)
        return inputs, targets

    def _check(self, index: int, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        found = specs_of(inputs) + specs_of(targets)
        if found != self.specs:
            raise TaskError(
                f"item {index} of `{self.name}` is {describe(found)}, but the first of `train` is "
                f"{describe(self.specs)}: make all items equal in dtype and shape"
            )

    def write(self, folder: Path) -> dict[str, np.ndarray]:
        """Write `<folder>/<input name>.npy`, first axis = items, a few items at a time; returns the targets.

        A file appears under its name only when it is complete.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = {name: folder / f".{name}.part" for name in self.inputs.names}
        files = {}
        for spec in self.specs[: len(parts)]:
            shape = (len(self), *(size or 0 for size in spec.shape))
            files[spec.name] = np.lib.format.open_memmap(parts[spec.name], "w+", np.dtype(spec.dtype), shape)
        targets: dict[str, list[np.ndarray]] = {name: [] for name in self.targets.names}
        for where, inputs, wanted in self.chunks():
            for name, rows in inputs.items():
                files[name][where] = rows.numpy()
            for name, rows in wanted.items():
                targets[name].append(rows.numpy())
        for name, part in parts.items():
            files[name].flush()
            part.replace(folder / f"{name}.npy")
        return {name: np.concatenate(rows) for name, rows in targets.items()}


def _behind_subsets(data: Items, indices: Sequence[int]) -> tuple[Items, list[int]]:
    where = [int(i) for i in indices]
    while type(data) is Subset:
        where = [int(data.indices[i]) for i in where]
        data = data.dataset  # type: ignore[assignment]  # torch types it without __len__
    return data, where


def read_item(data: Items, index: int, split: str) -> tuple[Any, Any]:
    """`(inputs, target)` of one item, as the data set gives it."""
    with blame(f"item {index} of `{split}` cannot be read"):
        item = data[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        raise TaskError(
            f"an item of `{split}` must be a pair (inputs, target), got {got}; several inputs go in a tuple"
        )
    return item[0], item[1]


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The chosen rows, copied in one thread: torch's indexing takes all, and 6 ms a call on a busy machine."""
    tensor = tensor.detach().cpu()
    return tensor[rows] if tensor.dtype is torch.bfloat16 else torch.from_numpy(tensor.numpy()[rows])


def plain(tensor: Tensor) -> Tensor:
    """On the CPU without gradient, float32 for any floating type, other types kept."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def input_leaf(value: Any) -> Tensor:
    """An input as the model gets it."""
    if not isinstance(value, Tensor):
        raise TaskError(f"an input must be a tensor, got {type(value).__name__}")
    return plain(value)


def target_leaf(value: Any) -> Tensor:
    """A target, from a tensor, an array or a number."""
    if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        raise TaskError(f"a target must be a number or a tensor, got {type(value).__name__}")
    return plain(torch.as_tensor(value))


def specs_of(leaves: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of each tensor."""
    return tuple(
        TensorSpec(name=name, dtype=str(leaf.dtype).removeprefix("torch."), shape=tuple(leaf.shape))
        for name, leaf in leaves.items()
    )


def describe(specs: Sequence[TensorSpec]) -> str:
    """For a message: `x float32[1, 8, 8], target int64[]`."""
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever the user's own code raises inside becomes one TaskError: what failed, the exception, its place."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{what}: {error}") from error
    except AutocompressError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and may call sys.exit
        raise TaskError(f"{what}: {said(error)}") from error


def said(error: BaseException) -> str:
    """An exception in one line: type, message, and file and line in the user's code where there is one."""
    place = ""
    text = str(error)
    if isinstance(error, SyntaxError):
        text, place = error.msg, f" ({Path(error.filename or '?').name}, line {error.lineno})"
    else:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not frame.filename.startswith((*_OURS, "<")):
                place = f" ({Path(frame.filename).name}, line {frame.lineno})"
                break
    text = re.sub(r"\s+", " ", text).strip()
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"

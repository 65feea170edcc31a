"""What stages get of a task, made of a described network or of tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from autocompress.compress.material import Material
from tests.compress.conftest import Described

Items = Iterator[tuple[dict[str, Tensor], Any]]


def of_case(case: Described, **more: Any) -> Material:
    """Items are drawn by seed, so many as are asked for. Nothing has labels unless `more` says so."""

    def calibration(items: int, size: int) -> Items:
        return ((case.inputs(size, seed=7 + start), None) for start in range(0, items, size))

    given = {
        "classifies": False,
        "loss": None,
        "items": 512,
        "fetch": lambda rows: (case.inputs(len(rows), seed=int(rows[0]) + 100), None),
        "fixed": False,
        "calibration": calibration,
        "validate": lambda _: 0.0,
    }
    return Material(call=case.call, **{**given, **more})


def of_tensors(
    inputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None, **more: Any
) -> Material:
    """Each tensor has an item a row; a model is called with one tensor. Calibration begins at the first item."""

    def call(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"])

    def fetch(rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": inputs[list(rows)]}, targets[list(rows)]

    def calibration(items: int, size: int) -> Items:
        count = min(items, len(inputs))
        return (fetch(range(start, min(start + size, count))) for start in range(0, count, size))

    given = {"classifies": loss is not None, "validate": lambda _: 0.0, "fixed": True}
    return Material(call=call, loss=loss, items=len(inputs), fetch=fetch, calibration=calibration, **{**given, **more})

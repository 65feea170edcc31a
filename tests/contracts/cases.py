"""What a runtime supplies to the suite: `tests/contracts/case_<runtime>.py` with `case(folder) -> Case`."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autocompress.device.runtime import RUNTIMES, Runtime, get_runtime

NAMES = (*RUNTIMES, "fake")
NEEDS_GPU = {"tensorrt"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A runtime, a model of it with its inputs and their outputs, and a model of mixed precision with what runs.

    The model's one input, "input", is float32 of shape (any, 4), or of the fixed `batch` where the format has no other.
    """

    runtime: Runtime
    path: Path
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    mixed: Path
    mixed_inputs: Mapping[str, NDArray[Any]]
    executed: Mapping[str, str]
    batch: int | None = None

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the input, None for a free size."""
        return (self.batch, 4)

    @property
    def runtime_name(self) -> str:
        """As a profile of one's own names it."""
        return f"{type(self.runtime).__module__}:{type(self.runtime).__qualname__}"


def parameters() -> list[Any]:
    """The runtimes of the table and the fake, as parameters of a fixture."""
    return [pytest.param(name, marks=[pytest.mark.gpu] if name in NEEDS_GPU else []) for name in NAMES]


def case_of(name: str, folder: Path) -> Case:
    """The case of a runtime; the test is skipped with the runtime's own reason where it is not usable."""
    if name in RUNTIMES and not (found := get_runtime(name).available()).usable:
        pytest.skip(f"{name}: {found.reason}")
    made: Case = importlib.import_module(f"tests.contracts.case_{name}").case(folder)
    return made


def rows(count: int = 5, seed: int = 1) -> NDArray[Any]:
    """Normal noise of shape (count, 4)."""
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)

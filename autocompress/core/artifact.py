"""A model file, by path and hash."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autocompress.core.errors import InputError

Format = Literal["onnx", "openvino", "tflite", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A model's input or output. `shape` has None where the size is free (the batch)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that its vendor's runtime loads without us.

    Attributes:
        path: may be relative to a run or a package.
        options: of the runtime, with which this file is loaded; they go before those of the profile.
    """

    path: str
    format: Format
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str
    size_bytes: int
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size_bytes < 1:
            raise InputError(f"`size_bytes` must be positive, got {self.size_bytes}")

    @property
    def key(self) -> str:
        """Names what is run: the SHA-256 of the file, and where it has options of its own, of both."""
        if not self.options:
            return self.sha256
        return hashlib.sha256(json.dumps([self.sha256, dict(self.options)], sort_keys=True).encode()).hexdigest()

    @property
    def dynamic_batch(self) -> bool:
        """Whether every input takes any batch size."""
        return all(spec.shape and spec.shape[0] is None for spec in self.inputs)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A split's inputs on the disk, as a model takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import StageError
from autocompress.device.runtime import Array

BATCH_ITEMS = 16
BATCH_BYTES = 16 * 2**20


class Inputs:
    """A folder with one `<input name>.npy` per input, items along the first axis.

    Integers are given in the type of the model, where all of them fit: a converter may make 32 bits of 64.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        files = sorted(folder.glob("*.npy"))
        if not files:
            raise StageError("load", f"there are no inputs: {folder} holds no .npy file")
        self._arrays = {f.stem: np.load(f, mmap_mode="r", allow_pickle=False) for f in files}
        counts = {name: len(array) for name, array in self._arrays.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise StageError("load", f"the inputs in {folder} must have the same number of items, got {counts}")
        self.count = next(iter(counts.values()))
        self._dtypes = {name: self._dtype(name, dtypes.get(name, array.dtype)) for name, array in self._arrays.items()}

    @property
    def first(self) -> dict[str, Array]:
        """The first item as a batch of one."""
        return self.items(0, 1)

    @property
    def batch(self) -> int:
        """Items that go into one batch."""
        item_bytes = sum(array[:1].nbytes for array in self._arrays.values())
        return int(np.clip(BATCH_BYTES // max(1, item_bytes), 1, BATCH_ITEMS))

    def items(self, start: int, stop: int) -> dict[str, Array]:
        """A batch, in memory."""
        return {name: np.array(array[start:stop], self._dtypes[name]) for name, array in self._arrays.items()}

    def _dtype(self, name: str, wanted: np.dtype[Any]) -> np.dtype[Any]:
        array = self._arrays[name]
        has: np.dtype[Any] = array.dtype
        if has == wanted or not all(np.issubdtype(t, np.integer) for t in (has, wanted)):
            return has
        low, high, limits = array.min(), array.max(), np.iinfo(wanted)
        if low < limits.min or high > limits.max:
            raise StageError("load", f"input {name!r} is {wanted} in the model, and its values go from {low} to {high}")
        return wanted

"""Items: structures, the quick path over tensors, and files written a few items at a time."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from autocompress.core.errors import TaskError
from autocompress.tasks.items import Split, Structure, specs_of


def split_of(data: Any) -> Split:
    """A split of `data`, whose items are a tensor and a number."""
    x, y = data[0]
    specs = specs_of({"x": x.float()}) + specs_of({"target": torch.as_tensor(y)})
    one = Structure(kind="tensor", names=("x",))
    return Split(name="validation", data=data, inputs=one, targets=Structure.of(y, "target"), specs=specs)


@pytest.mark.parametrize(
    ("value", "names"), [(1, ("v",)), ((1, 2), ("v_0", "v_1")), ({"b": 1, "a": 2}, ("b", "a")), ((7,), ("v_0",))]
)
def test_build_undoes_flatten(value: Any, names: tuple[str, ...]) -> None:
    structure = Structure.of(value, "v")
    assert structure.names == names
    assert structure.build(structure.flatten(value)) == value


def test_a_dict_is_read_by_its_keys_in_the_order_of_the_first() -> None:
    structure = Structure.of({"tokens": 1, "mask": 2}, "input")
    assert list(structure.flatten({"mask": 4, "tokens": 3}).items()) == [("tokens", 3), ("mask", 4)]
    with pytest.raises(TaskError, match=r"expected the keys \['mask', 'tokens'\], got \['mask', 'token'\]"):
        structure.flatten({"mask": 4, "token": 3})


class Slow:
    """The same items, one by one: no quick path."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def test_the_quick_path_equals_the_loop_through_nested_subsets() -> None:
    whole = TensorDataset(torch.rand(50, 3, dtype=torch.float64), torch.arange(50))
    data = Subset(Subset(whole, list(range(10, 40))), [5, 0, 29])
    quick, slow = split_of(data).rows([0, 1, 2]), split_of(Slow(data)).rows([0, 1, 2])
    assert quick[0]["x"].dtype is torch.float32
    assert torch.equal(quick[0]["x"], slow[0]["x"])
    assert quick[1]["target"].tolist() == slow[1]["target"].tolist() == [15, 10, 39]


def test_many_items_of_a_tensor_dataset_are_written_in_no_time(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(55_000, 1, 8, 8), torch.arange(55_000))
    start = time.process_time()
    targets = split_of(Subset(data, range(55_000))).write(tmp_path)
    assert time.process_time() - start < 2
    assert np.array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), data.tensors[0].numpy())
    assert targets["target"].tolist() == list(range(55_000))


def test_a_fault_while_writing_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    items = [(torch.zeros(2), 0.5)] * 70 + [(torch.zeros(3), 0.5)]
    with pytest.raises(TaskError, match=r"item 70 of `validation` is x float32\[3\]"):
        split_of(items).write(tmp_path)
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_types_that_are_not_floating_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    data = TensorDataset(torch.ones(5, 2, dtype=dtype), torch.arange(5))
    name = str(dtype).removeprefix("torch.")
    one = Structure(kind="tensor", names=("x",))
    specs = specs_of({"x": data[0][0], "target": data[0][1]})
    Split(name="test", data=data, inputs=one, targets=Structure.of(0, "target"), specs=specs).write(tmp_path)
    assert np.load(tmp_path / "x.npy").dtype == np.dtype(name)

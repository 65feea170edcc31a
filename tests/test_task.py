"""Tasks: construction, checking, and what a checked task offers."""
# ruff: noqa: ARG005  # metrics and models of one line ignore what they do not need

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

from autocompress.core.errors import StageError, TaskError
from autocompress.task import CheckedTask, Task, check_task, load_task

FILES = Path(__file__).parent / "data" / "tasks"


def table(items: int = 40, features: int = 6) -> TensorDataset:
    """Rows of numbers with one of three labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(items, features, generator=generator), torch.arange(items) % 3)


def linear() -> nn.Module:
    """Three logits from six numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def task(**changed: Any) -> Task:
    """A sound task with some fields changed."""
    fields: dict[str, Any] = {"name": "t", "model": linear, "train": table(), "validation": table(30)}
    return Task(**{**fields, **changed})


def model_of(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    """A builder of a module whose forward is `function`."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return Net


class Pairs:
    """A data set from a list of items, or from a function of the index."""

    def __init__(self, items: list[Any] | Callable[[int], Any], count: int = 20) -> None:
        self.items = items
        self.count = len(items) if isinstance(items, list) else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.items[index] if isinstance(self.items, list) else self.items(index)


def sentence(error: pytest.ExceptionInfo[TaskError]) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": ""}, "`name` must be letters, digits, '.', '_' or '-', got ''"),
        ({"name": "a/b"}, "`name` must be letters, digits, '.', '_' or '-', got 'a/b'"),
        ({"model": 3}, "`model` must be a function that builds the model, such as lambda: net, got a int"),
        ({"model": nn.ReLU()}, "`model` must be a function that builds the model, such as lambda: net, got a ReLU"),
        ({"metric": 0.5}, "`metric` must be a function, got 0.5"),
        ({"loss": "mse"}, "`loss` must be a function, got 'mse'"),
        ({"student": 1}, "`student` must be a function, got 1"),
        ({"teachers": [linear, 4]}, "`teachers` must be a list of functions that build models"),
        ({"train": iter([])}, "`train` must be indexable and have a length, got list_iterator"),
        ({"validation": None}, "`validation` must be indexable and have a length, got NoneType"),
        ({"test": []}, "`test` has no items"),
    ],
)
def test_a_task_is_validated_on_construction(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as error:
        task(**changed)
    assert message in sentence(error)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": lambda: 1 / 0}, "`model` fails to build: ZeroDivisionError: division by zero (test_task.py, line"),
        ({"model": lambda: "net"}, "`model` must return a torch.nn.Module, got str"),
        (
            {"model": lambda: nn.Linear(7, 3)},
            "the model fails on the first item, a batch of 1 of input float32[6]: RuntimeError: mat1 and mat2 shapes",
        ),
        ({"model": model_of(lambda x: 5)}, "the model must return tensors, but its output is a int"),
        ({"model": model_of(lambda x: {"x": x})}, "the model has an input and an output named 'x': rename one of them"),
        ({"model": model_of(lambda x: ())}, "there is no output in an empty tuple"),
        (
            {"model": model_of(lambda x: x[:, :3].sum(0))},
            "the model's output must have one row an item, but 30 items gave [3]",
        ),
        ({"model": model_of(lambda x: x[:, :3] * torch.nan)}, "the model's output is NaN on the task's own validation"),
        ({"train": Pairs([1, 2])}, "an item of `train` must be a pair (inputs, target), got a int"),
        (
            {"train": Pairs([(1, 2, 3)])},
            "must be a pair (inputs, target), got a tuple of 3; several inputs go in a tuple",
        ),
        ({"train": Pairs([(np.zeros(6), 1)])}, "an input must be a tensor, got ndarray"),
        ({"train": Pairs([(torch.zeros(6), "cat")])}, "a target must be a number or a tensor, got str"),
        (
            {"train": Pairs([({"a b": torch.zeros(6)}, 1)])},
            "must have plain names as keys (letters, digits, _), got 'a b'",
        ),
        ({"train": Pairs([((torch.zeros(6),) * 2, 1)])}, "an item has 2 inputs, but the model's forward takes 1"),
        ({"train": Pairs(lambda i: {}[i])}, "item 0 of `train` cannot be read: KeyError: 0 (test_task.py, line"),
        (
            {"validation": table(features=5)},
            "item 0 of `validation` is input float32[5], target int64[], but the first of `train` is "
            "input float32[6], target int64[]: make all items equal in dtype and shape",
        ),
        (
            {"test": Pairs(lambda i: (torch.zeros(6 if i < 10 else 7), 1))},
            "of `test` is input float32[7], target int64[]",
        ),
        (
            {"calibration": Pairs(lambda i: ((torch.zeros(6), torch.zeros(6)), 1))},
            "item 0 of `calibration` is not like the first of `train`: expected a tensor of 1, got a tuple of 2",
        ),
        ({"metric": lambda o, t: o.nothing}, "on 30 validation items the metric raises AttributeError: "),
        ({"metric": lambda o, t: float("nan")}, "on 30 validation items the metric gives nan, not a finite number"),
        ({"metric": lambda o, t: None}, "the metric raises TypeError: "),
        ({"loss": lambda o, t: o.missing}, "on 30 validation items the loss fails: AttributeError: "),
        ({"loss": lambda o, t: o}, "`loss` must give a finite scalar tensor, got shape [30, 3]"),
        ({"loss": lambda o, t: 0.5}, "`loss` must give a finite scalar tensor, got 0.5"),
        ({"loss": lambda o, t: o.sum() * torch.inf}, "`loss` must give a finite scalar tensor, got tensor("),
    ],
)
def test_each_fault_of_a_task_is_one_sentence(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as error:
        check_task(task(**changed))
    assert message in sentence(error)


def test_float_targets_need_a_metric() -> None:
    data = TensorDataset(torch.rand(20, 6), torch.rand(20))
    with pytest.raises(TaskError) as error:
        check_task(task(train=data, validation=data))
    assert sentence(error) == (
        "top-1 accuracy, the default metric, needs integer class labels, got float32 targets: "
        "give the task a metric=f(outputs, targets) -> float, higher is better"
    )


def test_top1_refuses_outputs_that_would_broadcast() -> None:
    with pytest.raises(TaskError, match=r"needs one score a class and item, got outputs of \[30, 3, 2\]"):
        check_task(task(model=model_of(lambda x: x.view(-1, 3, 2))))


def test_a_loss_that_does_not_fit_names_the_default() -> None:
    data = TensorDataset(torch.rand(20, 6), torch.rand(20))
    with pytest.raises(TaskError) as error:
        check_task(task(train=data, validation=data, metric=lambda o, t: 1.0))
    assert "the loss fails (cross-entropy is the default; give the task its own `loss`): RuntimeError" in sentence(
        error
    )


def test_the_model_is_put_in_eval_mode() -> None:
    assert not check_task(task()).model.training


def test_inputs_take_the_names_of_forward_and_optional_parameters_are_left() -> None:
    class Net(nn.Module):
        def forward(self, signal: Tensor, gain: Tensor, mode: str = "sum", *, scale: float = 1.0) -> Tensor:
            return (signal * gain)[:, :3] * scale

    data = Pairs(lambda i: ((torch.full((6,), float(i)), torch.ones(1)), i % 3))
    checked = check_task(task(model=Net, train=data, validation=data))
    assert checked.names == ("signal", "gain")
    inputs, targets = checked.batch("validation", [2, 3])
    assert torch.equal(checked.call(checked.model, inputs), torch.tensor([[2.0] * 3, [3.0] * 3]))
    assert targets.tolist() == [2, 0]


def test_a_forward_of_any_inputs_gives_them_numbers() -> None:
    class Net(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0] + inputs[1]

    data = Pairs(lambda i: ((torch.zeros(3), torch.ones(3)), i % 3))
    assert check_task(task(model=Net, train=data, validation=data)).names == ("input_0", "input_1")


def test_dict_outputs_and_dict_targets_reach_metric_and_loss_in_their_structure() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"value": x.sum(1), "count": mask.sum(1)}

    def item(i: int) -> Any:
        return {"x": torch.full((4,), i / 2), "mask": torch.ones(4, dtype=torch.bool)}, {"value": 2.0 * i, "count": 4}

    data = Pairs(item)
    checked = check_task(
        task(
            model=Net,
            train=data,
            validation=data,
            metric=lambda o, t: -float(np.abs(o["value"] - t["value"]).sum() + np.abs(o["count"] - t["count"]).sum()),
            loss=lambda o, t: functional.mse_loss(o["value"], t["value"]),
        )
    )
    inputs, targets = checked.batch("validation", range(20))
    assert inputs["mask"].dtype is torch.bool
    assert set(targets) == {"value", "count"}
    outputs = checked.flatten_outputs(checked.call(checked.model, inputs))
    assert list(outputs) == ["value", "count"]
    arrays = checked.unflatten({name: leaf.numpy() for name, leaf in outputs.items()})
    assert checked.metric(arrays, checked.targets("validation")) == 0.0


def test_tuple_outputs_are_numbered_and_come_back_as_a_tuple() -> None:
    checked = check_task(
        task(model=model_of(lambda x: (x[:, :3], x)), metric=lambda o, t: o[0].mean(), loss=first_loss)
    )
    outputs = checked.flatten_outputs(checked.call(checked.model, checked.batch("train", [0])[0]))
    assert list(outputs) == ["output_0", "output_1"]
    assert isinstance(checked.unflatten(outputs), tuple)


def first_loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of the first output."""
    return functional.cross_entropy(outputs[0], targets)


def test_the_default_metric_is_top1_and_int32_labels_do() -> None:
    data = TensorDataset(torch.eye(3).repeat(10, 1), (torch.arange(30) % 3).int())
    checked = check_task(task(model=nn.Identity, train=data, validation=data))
    outputs = np.eye(3, dtype=np.float32)[[0, 1, 0]]
    assert checked.metric(outputs, np.array([0, 1, 2])) == pytest.approx(2 / 3)


def test_a_metric_that_is_not_finite_is_a_failure_of_the_stage_score() -> None:
    checked = check_task(task(metric=lambda o, t: float(o.sum())))
    with pytest.raises(StageError, match="the metric gives inf, not a finite number") as error:
        checked.metric(np.array([[np.inf]]), np.array([0]))
    assert error.value.stage == "score"


def test_calibration_is_by_default_the_same_sample_of_train_each_time() -> None:
    data = table(2000)
    first, second = (check_task(task(train=data)).splits["calibration"] for _ in range(2))
    assert len(first) == 512
    assert isinstance(first.data, Subset)
    assert isinstance(second.data, Subset)
    assert first.data.indices == second.data.indices
    assert len(set(first.data.indices)) == 512
    assert max(first.data.indices) > 1900, "the sample is spread over the data"
    assert len(check_task(task()).splits["calibration"]) == 40


def test_the_own_calibration_set_is_taken_whole() -> None:
    assert len(check_task(task(calibration=table(7))).splits["calibration"]) == 7


def test_a_split_that_is_not_there_is_named() -> None:
    with pytest.raises(TaskError, match="task 't' has no test split; it has train, validation, calibration"):
        check_task(task()).targets("test")


@pytest.mark.parametrize("name", ["depthwise", "conv1d", "mlp", "transformer"])
def test_written_splits_equal_the_items(name: str, tmp_path: Path) -> None:
    checked = check_task(load_task(str(FILES / f"{name}.py")))
    data = checked.task.validation
    assert checked.write_split("validation", tmp_path) == len(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.npy" for n in checked.names)
    files = {n: np.load(tmp_path / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in checked.names}
    for index in (0, 1, 63, 64, len(data) - 1):
        inputs, target = data[index]
        for leaf, written in zip(checked.inputs.flatten(inputs).values(), files.values(), strict=True):
            assert written.dtype == leaf.numpy().dtype
            assert np.array_equal(written[index], leaf.numpy())
        assert np.array_equal(checked.targets("validation")[index], np.asarray(target))


def test_importing_the_package_costs_no_torch() -> None:
    code = "import sys, autocompress; dir(autocompress); sys.exit(any(m in sys.modules for m in ('torch', 'optuna')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checked_task_leaves_the_data_as_it_is() -> None:
    data = table()
    before = hashlib.sha256(data.tensors[0].numpy().tobytes()).hexdigest()
    checked: CheckedTask = check_task(task(train=data))
    checked.call(checked.model, checked.batch("train", [0, 1])[0])
    assert hashlib.sha256(data.tensors[0].numpy().tobytes()).hexdigest() == before

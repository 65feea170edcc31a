"""The task files in tests/data/tasks: trained, quick to load, and sensitive to broken weights."""

import time
from pathlib import Path

import pytest
import torch

from autocompress.task import CheckedTask, check_task, load_task

FOLDER = Path(__file__).parents[1] / "data" / "tasks"
ACCURACY = {"depthwise": 0.975, "conv1d": 0.985, "mlp": 0.974, "transformer": 0.997}


def score(checked: CheckedTask, model: torch.nn.Module, split: str) -> float:
    """The metric of `model` over a split."""
    with torch.no_grad():
        outputs = checked.call(model, checked.batch(split, range(len(checked.split(split))))[0])
    arrays = {name: leaf.numpy() for name, leaf in checked.flatten_outputs(outputs).items()}
    return checked.metric(checked.unflatten(arrays), checked.targets(split))


@pytest.mark.parametrize("name", ACCURACY)
def test_the_task_is_trained_and_broken_weights_show(name: str) -> None:
    load_task(str(FOLDER / f"{name}.py"))  # the first load imports scikit-learn
    start = time.process_time()
    checked = check_task(load_task(str(FOLDER / f"{name}.py")))
    assert time.process_time() - start < 2
    assert min(len(checked.split(part)) for part in ("validation", "test")) >= 300
    assert score(checked, checked.model, "validation") == pytest.approx(ACCURACY[name], abs=0.003)
    assert score(checked, checked.model, "test") > ACCURACY[name] - 0.02
    broken = checked.task.model()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in broken.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(correction=0))
    assert score(checked, broken, "validation") < ACCURACY[name] - 0.05


def test_inputs_cover_tensor_tuple_and_dict() -> None:
    kinds = {name: check_task(load_task(str(FOLDER / f"{name}.py"))).inputs.kind for name in ACCURACY}
    assert kinds == {"depthwise": "tensor", "conv1d": "tuple", "mlp": "tensor", "transformer": "dict"}


def test_the_padding_of_the_transformer_is_not_read() -> None:
    checked = check_task(load_task(str(FOLDER / "transformer.py")))
    inputs, _ = checked.batch("validation", range(50))
    changed = {**inputs, "tokens": torch.where(inputs["mask"] == 0, 5, inputs["tokens"])}
    with torch.no_grad():
        before, after = checked.call(checked.model, inputs), checked.call(checked.model, changed)
    assert torch.allclose(before, after, atol=1e-5)

"""The built-in task: a split that never changes, and weights that give their accuracy."""

import hashlib
import sys

import numpy as np
import pytest
import torch

from autocompress.core.errors import TargetError
from autocompress.task import check_task, load_task
from autocompress.tasks.digits import PARTS, WEIGHTS, split


def test_the_split_is_fixed() -> None:
    parts = split()
    assert {name: len(part) for name, part in parts.items()} == {"train": 997, "validation": 400, "test": 400}
    labels = np.concatenate([part.tensors[1].numpy() for part in parts.values()]).astype(np.uint8)
    images = np.concatenate([(part.tensors[0] * 16).numpy() for part in parts.values()]).astype(np.uint8)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "b3815d5071d392b6"
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "289a694478fa81c4"
    assert sorted(rest for part in PARTS.values() for rest in part) == list(range(9)), "no image in two parts"


def test_the_weights_give_their_accuracy() -> None:
    checked = check_task(load_task("digits"))
    assert checked.names == ("image",)
    for part, expected in (("validation", 0.9925), ("test", 1.0)):
        with torch.no_grad():
            outputs = checked.call(checked.model, checked.batch(part, range(400))[0])
        assert checked.metric(outputs.numpy(), checked.targets(part)) == pytest.approx(expected, abs=0.0026)


def test_the_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 400_000


def test_without_scikit_learn_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(TargetError, match=r"pip install 'autocompress\[digits\]'"):
        load_task("digits")

"""The example's network has its package's weights at their places, and can be compressed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autocompress.compress.layers import describe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PALACE, DAISY = 698, 985  # ImageNet's classes


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", EXAMPLES / "efficientnet_lite0.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_photographs_are_known(example: ModuleType) -> None:
    from sklearn.datasets import load_sample_images

    model, found = example.model(), []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float()
        side, middle = image.shape[1], image.shape[2] // 2
        part = image[None, :, :, middle - side // 2 : middle + side // 2]
        part = torch.nn.functional.interpolate(part, (example.SIDE, example.SIDE), mode="bilinear", antialias=True)
        with torch.no_grad():
            found.append(int(model((part - 127) / 128).argmax()))
    assert found == [PALACE, DAISY]


def test_crops_have_the_class_that_fp32_gives(example: ModuleType) -> None:
    images, labels = example.answered(6, 0).tensors
    assert images.shape == (6, 3, example.SIDE, example.SIDE)
    with torch.no_grad():
        assert torch.equal(example.model()(images).argmax(1), labels)


def test_all_of_it_can_be_compressed(example: ModuleType) -> None:
    sample = example.crops(1, 0)
    structure, _ = describe(example.model(), lambda model: model(sample))
    assert len(structure.layers) == 50
    assert len(structure.groups) == 24  # what 15 blocks widen to, what 7 stages and the stem give, and the head
    assert len(structure.blocks) == 9
    assert set(structure.left_alone) == {"classifier"}  # its channels are the classes

"""What is done to weights before they are rounded: all of it on a small network trained on digits."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.compress.absorb import absorb
from autocompress.compress.bias import correct_bias, rounded_copy
from autocompress.compress.equalize import equalize
from autocompress.compress.material import Material
from autocompress.compress.quantize import Learned
from autocompress.compress.rounding import adaround
from autocompress.core.candidate import LayerChoice, parse_precision
from autocompress.tasks import digits
from tests.compress.materials import of_tensors

SAMPLE = slice(0, 2)


@pytest.fixture(scope="module")
def material() -> Material:
    images, labels = digits.split()["train"].tensors
    return of_tensors(images[:128], labels[:128], F.cross_entropy)


@pytest.fixture(scope="module")
def model(material: Material) -> nn.Module:
    """The digits network with absorbed BatchNorms. Not to be changed."""
    net = digits.model().requires_grad_(False)
    absorb(net, lambda m: material.call(m, material.fetch([0, 1])[0]))
    return net


def layers(model: nn.Module, precision: str) -> dict[str, LayerChoice]:
    kinds = (nn.Conv2d, nn.Linear)
    return {name: parse_precision(precision) for name, module in model.named_modules() if isinstance(module, kinds)}


def wrong(one: nn.Module, other: nn.Module) -> float:
    """Mean squared difference of the outputs on images that nothing was fitted to."""
    images = digits.split()["validation"].tensors[0]
    with torch.no_grad():
        return float((one(images) - other(images)).square().mean())


def test_weights_rounded_up_or_down_keep_more_than_rounded_to_nearest(model: nn.Module, material: Material) -> None:
    chosen = {n: c for n, c in layers(model, "w3a32").items() if n in ("conv", "fc")}
    nearest = rounded_copy(model, chosen, Learned())
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        rounded.get_submodule("fc").get_parameter("weight")[:, :8] = 0
    reference = copy.deepcopy(rounded)
    scales = adaround(rounded, reference, chosen, material, 0)
    assert scales.keys() == chosen.keys()
    for name, scale in scales.items():
        weight = rounded.get_submodule(name).get_parameter("weight").numpy()
        before = reference.get_submodule(name).get_parameter("weight").numpy()
        steps = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert np.abs(steps).max() <= 3.001
        assert not weight[before == 0].any()
        moved = np.abs(steps - before / scale.reshape(-1, *[1] * (weight.ndim - 1)))
        assert moved[np.abs(before) < 3 * scale.reshape(-1, *[1] * (weight.ndim - 1))].max() <= 1.001
    assert wrong(rounded, reference) < 0.5 * wrong(nearest, model)


def test_the_mean_error_of_rounding_is_taken_off_the_biases(model: nn.Module, material: Material) -> None:
    chosen = layers(model, "w3a32")
    corrected = copy.deepcopy(model)
    done = correct_bias(corrected, model, chosen, material, Learned())
    assert set(done) == chosen.keys()
    weights = {n: p for n, p in model.named_parameters() if not n.endswith("bias")}
    assert all(torch.equal(p, weights[n]) for n, p in corrected.named_parameters() if n in weights)
    means = []
    for net in (model, rounded_copy(model, chosen, Learned()), rounded_copy(corrected, chosen, Learned())):
        images = material.fetch(range(128))[0]
        with torch.no_grad():
            means.append(material.call(net, images).mean(0))
    assert (means[2] - means[0]).abs().max() < 0.05 * (means[1] - means[0]).abs().max()


def test_equalised_layers_compute_the_same_with_ranges_that_are_alike(model: nn.Module, material: Material) -> None:
    uneven = copy.deepcopy(model)
    block = next(name for name, m in uneven.named_modules() if isinstance(m, nn.Conv2d) and "conv1" in name)
    norm, after = (uneven.get_submodule(block.replace("conv1", n)) for n in ("bn1", "conv2"))
    factor = torch.logspace(-1.5, 1.5, len(norm.get_parameter("bias")))
    with torch.no_grad():
        uneven.get_submodule(block).get_parameter("weight").mul_(factor.view(-1, 1, 1, 1))
        norm.get_parameter("bias").mul_(factor)
        after.get_parameter("weight").div_(factor.view(1, -1, 1, 1))
    assert wrong(uneven, model) < 1e-6
    even = copy.deepcopy(uneven)
    batch = material.fetch([0, 1])[0]
    done = equalize(even, lambda m: material.call(m, batch))
    assert block in done
    assert wrong(even, uneven) < 1e-6
    given = even.get_submodule(block).get_parameter("weight").abs().amax((1, 2, 3))
    read = even.get_submodule(block.replace("conv1", "conv2")).get_parameter("weight").abs().amax((0, 2, 3))
    torch.testing.assert_close(given, read, rtol=1e-3, atol=1e-5)
    chosen = {block.replace("conv1", "conv2"): parse_precision("w4a32")}
    errors = [wrong(rounded_copy(net, chosen, Learned()), net) for net in (even, uneven)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(("between", "done"), [(nn.ReLU(), ("0",)), (nn.ReLU6(), ()), (nn.Hardswish(), ())])
@pytest.mark.parametrize("bias", [0.5, -0.5])  # below zero, the sample leaves every channel silent
def test_what_bends_beyond_the_sample_is_not_equalised(between: nn.Module, bias: float, done: tuple[str, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 3)).requires_grad_(False)
    nn.init.constant_(net.get_submodule("0").get_parameter("bias"), bias)
    before = copy.deepcopy(net.state_dict())
    x = 0.01 * torch.rand(2, 4)  # nothing in it comes near 6
    assert equalize(net, lambda m: m(x)) == done
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()) == (not done)

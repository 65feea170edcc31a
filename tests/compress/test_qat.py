import copy
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.qat import Aware
from autocompress.compress.quantize import Learned
from autocompress.core.candidate import LayerChoice, parse_precision
from tests import nets
from tests.compress.conftest import Described
from tests.compress.materials import of_case, of_tensors

Get = Callable[[str], Described]


def all_of(case: Described, precision: str) -> dict[str, LayerChoice]:
    return {layer.name: parse_precision(precision) for layer in case.structure.layers}


def outputs(case: Described, net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    found = case.call(net, batch)
    return torch.cat([t.flatten(1) for t in (found.values() if isinstance(found, dict) else [found])], 1)


def taught(case: Described, net: nn.Module, steps: int = 60) -> None:
    """Some steps of Adam towards the outputs of the original."""
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), 2e-3)
    net.train()
    for step in range(steps):
        batch = case.inputs(64, seed=500 + step)
        with torch.no_grad():
            wanted = outputs(case, case.net, batch)
        optimizer.zero_grad()
        F.mse_loss(outputs(case, net, batch), wanted).backward()
        optimizer.step()
    net.eval().requires_grad_(False)


def error(case: Described, net: nn.Module) -> float:
    batch = case.inputs(128, seed=9)
    with torch.no_grad():
        return float(F.mse_loss(outputs(case, net, batch), outputs(case, case.net, batch)))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("residual", "w3a8"), ("perceptron", "w2a8"), ("perceptron", "k2a32"), ("perceptron", "p3a32")],
)
def test_what_was_trained_aware_is_nearer_to_the_original_than_what_is_only_rounded(
    described: Get, name: str, precision: str
) -> None:
    case = described(name)
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, precision), of_case(case))
    before = error(case, net)
    taught(case, net, 20 if name == "residual" else 60)
    simulated = error(case, net)
    assert simulated < 0.6 * before
    aware.finish()
    assert error(case, net) < 0.6 * before


@pytest.mark.parametrize("name", nets.CASES)
def test_weights_end_on_their_scales_and_the_model_is_plain_again(described: Get, name: str) -> None:
    case = described(name)
    net = copy.deepcopy(case.net)
    choices = all_of(case, "w4a8")
    aware = Aware(net, choices, of_case(case))
    assert not aware.left_alone
    taught(case, net, 3)
    batch = case.inputs(4, seed=1)
    learned = aware.finish()
    assert set(learned.scales) == set(choices)
    for layer, scale in learned.scales.items():
        weight = net.get_submodule(layer).get_parameter("weight")
        steps = weight / torch.from_numpy(scale).view(-1, *[1] * (weight.ndim - 1))
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= 7.001
    assert [key for key, _ in net.named_parameters()] == [key for key, _ in case.net.named_parameters()]
    assert not any("forward" in vars(module) for module in net.modules())
    assert set(learned.inputs) == {layer for layer in choices if layer != "tokens"}
    assert torch.isfinite(outputs(case, net, batch)).all()


def test_the_finished_model_gives_what_was_simulated(described: Get) -> None:
    case = described("residual")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w4a32"), of_case(case))
    taught(case, net, 3)
    batch = case.inputs(4, seed=1)
    simulated = outputs(case, net, batch)
    assert not aware.finish().inputs
    torch.testing.assert_close(outputs(case, net, batch), simulated, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(simulated, outputs(case, case.net, batch), rtol=1e-2, atol=1e-2)


def test_scales_and_ranges_are_trained(described: Get) -> None:
    case = described("residual")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w4a4"), of_case(case))
    begun = Aware(copy.deepcopy(case.net), all_of(case, "w4a4"), of_case(case)).finish()
    taught(case, net, 10)
    learned = aware.finish()
    for layer, scale in learned.scales.items():
        assert not np.allclose(scale, begun.scales[layer], rtol=1e-4)
        assert learned.inputs[layer] != begun.inputs[layer]


def test_layers_that_read_one_tensor_share_its_range(described: Get) -> None:
    case = described("encoder")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w8a8"), of_case(case))
    taught(case, net, 5)
    inputs = aware.finish().inputs
    assert inputs["q"] == inputs["k"] == inputs["v"]
    assert len(set(inputs.values())) == len(inputs) - 2


def test_symmetric_ranges_reach_equally_far(described: Get) -> None:
    case = described("flat")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w8a8"), of_case(case), dialect="int8")
    taught(case, net, 3)
    assert all(low == -high < 0 for low, high in aware.finish().inputs.values())


def test_it_begins_with_what_was_learned_before(described: Get) -> None:
    case = described("flat")
    before = Learned(scales={"fc": np.full(5, 0.125, np.float32)}, inputs={"fc": (0.0, 2.0)})
    learned = Aware(copy.deepcopy(case.net), all_of(case, "w4a8"), of_case(case), before).finish()
    assert learned.scales["fc"].tolist() == [0.125] * 5
    assert learned.inputs["fc"] == (0.0, 2.0)
    assert learned.inputs["up"] != (0.0, 2.0)


def test_zeros_stay_zeros(described: Get) -> None:
    case = described("perceptron")
    for precision in ("w4a8", "k3a32", "p4a32", "s4a32"):
        net = copy.deepcopy(case.net)
        weight = net.get_submodule("0").get_parameter("weight")
        weight[:, ::2] = 0
        aware = Aware(net, all_of(case, precision), of_case(case))
        taught_weight = net.get_submodule("0")(case.inputs(2)["input"])
        assert torch.isfinite(taught_weight).all()
        aware.finish()
        assert (weight[:, ::2] == 0).all()
        assert len(weight.unique()) > 2


@pytest.mark.parametrize(("precision", "most"), [("k2a32", 4), ("p3a8", 8), ("s4a32", 16)])
def test_a_codebook_has_so_many_values_after_training(described: Get, precision: str, most: int) -> None:
    case = described("flat")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, precision), of_case(case))
    taught(case, net, 5)
    learned = aware.finish()
    assert not learned.scales
    for name in ("conv", "up", "fc"):
        weight = net.get_submodule(name).get_parameter("weight")
        assert 2 < len(weight.unique()) <= most
        assert not torch.allclose(weight, case.net.get_submodule(name).get_parameter("weight"), atol=1e-3)


def test_a_copy_made_meanwhile_is_its_own(described: Get) -> None:
    case = described("flat")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w2a8"), of_case(case))
    twin = copy.deepcopy(net)
    batch = case.inputs(4, seed=1)
    before = outputs(case, net, batch)
    assert torch.equal(outputs(case, twin, batch), before)
    twin.get_submodule("fc").get_parameter("weight").zero_()
    assert torch.equal(outputs(case, net, batch), before)
    aware.finish()
    assert not torch.equal(outputs(case, twin, batch), before)


def test_batchnorm_is_absorbed_first_and_keeps_its_statistics_and_factors(described: Get) -> None:
    case = described("perceptron")
    net = copy.deepcopy(case.net)
    aware = Aware(net, all_of(case, "w8a8"), of_case(case))
    taught(case, net, 2)
    aware.finish()
    for name in ("1", "4"):
        norm = net.get_submodule(name)
        assert (norm.running_mean == 0).all()
        torch.testing.assert_close(norm.weight / (norm.running_var + norm.eps).sqrt(), torch.ones(len(norm.weight)))
        assert (norm.bias != 0).all()


def test_dynamic_layers_and_weight_only_ones_have_no_range_and_others_are_left_alone(described: Get) -> None:
    case = described("perceptron")
    choices = {"0": parse_precision("w8d8"), "3": parse_precision("w4a32"), "1": parse_precision("w8a8")}
    net = copy.deepcopy(case.net)
    aware = Aware(net, choices, of_case(case))
    assert aware.left_alone == {"1": "a BatchNorm1d does not round"}
    learned = aware.finish()
    assert set(learned.scales) == {"0", "3"}
    assert not learned.inputs


def test_a_layer_called_by_keyword_rounds_too() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    net = nets.seeded(Keyword)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    material = of_tensors(x, x)
    before = net(x)
    Aware(net, {"fc": parse_precision("w2a2")}, material)
    assert not torch.allclose(net(x), before, atol=0.05)

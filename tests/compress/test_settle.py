import copy

import torch
from torch.nn import functional as F

from autocompress.compress.settle import settle_batchnorm
from tests import nets
from tests.compress.conftest import state_of


def test_settling_batchnorm_estimates_plain_averages_and_changes_nothing_else() -> None:
    net = nets.seeded(nets.perceptron)
    before = state_of(net)
    data = [nets.rows(64, seed=1), nets.rows(64, seed=2)]
    settle_batchnorm(net, nets.positional, data)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{i}.{what}" for i in "14" for what in ("running_mean", "running_var", "num_batches_tracked")}
    seen = torch.stack([F.linear(b["input"], net[0].weight, net[0].bias) for b in data])
    torch.testing.assert_close(net[1].running_mean, seen.mean(1).mean(0))
    torch.testing.assert_close(net[1].running_var, seen.var(1).mean(0))
    assert net[1].momentum == 0.1
    assert not any(module.training for module in net.modules())


def test_settling_forgets_statistics_that_were_wrong() -> None:
    data = [nets.rows(256, seed=seed) for seed in range(4)]
    net = nets.seeded(nets.perceptron)
    settle_batchnorm(net, nets.positional, data)
    wanted = net(data[0]["input"])
    spoilt = copy.deepcopy(net)
    spoilt[1].running_mean += 5
    spoilt[4].running_var *= 9
    assert (spoilt(data[0]["input"]) - wanted).abs().max() > 0.1
    settle_batchnorm(spoilt, nets.positional, data)
    torch.testing.assert_close(spoilt(data[0]["input"]), wanted)

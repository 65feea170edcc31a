from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.bench import Bench, bench_task
from autocompress.core.measurement import Measurement
from autocompress.core.space import Group
from autocompress.device.hosts import LocalHost
from autocompress.stairs import Stairs, grid, parts, plateau_edges
from tests import nets, tiny
from tests.scripted import measurement


def measured(ratios: Mapping[int, float], noise: float = 0.0) -> dict[int, Measurement]:
    """Timed together, blocks alike up to `noise`."""
    found = {}
    for i, (width, ratio) in enumerate(ratios.items()):
        plain = measurement(1.0)
        blocks = tuple((ratio * (1 + noise * (-1) ** (b + i)),) for b in range(8))
        found[width] = replace(plain, samples=blocks, artifact_sha256=f"{width:064d}")
    return found


LINEAR = {w: w / 64 for w in (56, 48, 40, 32, 24, 16, 8)}
STAIRS = {w: -(-w // 16) * 16 / 64 for w in (56, 48, 40, 32, 24, 16, 8)}


def test_every_width_is_an_edge_where_latency_is_linear_in_channels() -> None:
    assert plateau_edges(measured(LINEAR), 64) == (64, *LINEAR)


def test_the_edges_of_a_stair_are_its_multiples() -> None:
    assert plateau_edges(measured(STAIRS), 64) == (64, 48, 32, 16)


def test_a_width_that_runs_slower_than_a_wider_one_is_no_edge() -> None:
    assert plateau_edges(measured({168: 1.05, 144: 0.75, 96: 0.5, 48: 0.25}), 192) == (192, 144, 96, 48)


def test_where_noise_hides_the_stairs_all_widths_stay() -> None:
    assert plateau_edges(measured(STAIRS, noise=0.3), 64) == (64, *STAIRS)


def test_where_surely_nothing_is_won_the_original_is_the_only_edge() -> None:
    assert plateau_edges(measured(dict.fromkeys(LINEAR, 1.0)), 64) == (64,)
    assert plateau_edges(measured(dict.fromkeys(LINEAR, 1.0), noise=0.05), 64) == (64, *LINEAR)


@pytest.mark.parametrize("width", [8, 12, 48, 64, 96, 100, 384, 960, 2048])
@pytest.mark.parametrize("step", [1, 4, 8, 12])
def test_a_grid_descends_from_the_original_in_multiples_of_the_step(width: int, step: int) -> None:
    found = grid(width, step)
    assert found[0] == width
    assert list(found) == sorted(set(found), reverse=True)
    assert all(w > 0 and w % step == 0 for w in found[1:])


def test_a_grid_has_the_widths_beside_an_eighth_and_the_next_even_multiple() -> None:
    assert grid(64, 8) == (64, 56, 48, 40, 32, 24, 16, 8)
    assert {840, 848} < set(grid(960, 8))
    assert grid(512, 8) == (512,)  # its eighths are multiples of 64: no stair begins between


class Nest(nn.Module):
    """Two equal blocks with channels of their own, a mapping that takes its input by keyword, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self._block(), self._block()
        self.named = Named()
        self.head = nn.Linear(4, 5)

    def _block(self) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 3, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.named(x=self.second(self.first(x))).mean((2, 3)))


class Named(nn.Module):
    """Called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def items(count: int = 4) -> list[Any]:
    return list(nets.image(count)["x"])


def test_a_part_is_run_on_what_it_gets_inside_the_model() -> None:
    net = nets.seeded(Nest)
    found = parts(bench_task("nest", net, items()), ["first", "second", "named", "second.2"])
    assert set(found) == {"first", "second", "second.2"}  # not what is called by keyword
    with torch.no_grad():
        wanted = net.get_submodule("first")(torch.stack(items()))
    assert torch.allclose(torch.stack(list(found["second"].items)), wanted)
    assert found["second.2"].shapes == ((32, 8, 8),)


def test_groups_are_timed_in_parts_and_equal_ones_once(tmp_path: Path) -> None:
    task = bench_task("nest", nets.seeded(Nest), items())
    with LocalHost(tiny.PROFILE) as host:
        whole = Bench(task, tiny.PROFILE, host, tmp_path / "whole")
        found, left = Stairs(task, whole, host, tmp_path, "fp32", {}).measure(deadline=float("inf"))
    by_name = {frozenset(stair.groups): stair for stair in found}
    assert by_name[frozenset(("first.0", "second.0"))].module in ("first", "second")
    assert by_name[frozenset(("named.up",))].module == ""  # its part cannot be run by itself
    assert all(s.widths[0] == s.edges[0] and len(s.ratios) == len(s.widths) for s in found)
    assert {len(s.widths) for s in found if s.widths[0] == 32} == {8}
    assert left == []


def test_groups_without_time_are_named(tmp_path: Path) -> None:
    task = bench_task("nest", nets.seeded(Nest), items())
    with LocalHost(tiny.PROFILE) as host:
        whole = Bench(task, tiny.PROFILE, host, tmp_path / "whole")
        found, left = Stairs(task, whole, host, tmp_path, "fp32", {}).measure(deadline=0)
    assert found == []
    assert "widths of first.0" in left


def test_holders_go_from_the_smallest_module_to_the_model() -> None:
    from autocompress.stairs import _holders

    assert _holders(Group(name="a.b.c", width=8, step=1, layers=("a.b.c", "a.b.d.e"))) == ["a.b", "a", ""]
    assert _holders(Group(name="a.b", width=8, step=1, layers=("a.b", "c"))) == [""]

"""Networks described once, for all tests here. They are not to be changed: the last test of the session says so."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.cut import Anatomy
from autocompress.compress.layers import describe
from autocompress.compress.width import ChannelGroup
from autocompress.core.space import Structure
from tests import nets


@dataclass(frozen=True, kw_only=True)
class Described:
    """A network, a sample of its inputs, and what was found in it."""

    net: nn.Module
    inputs: Callable[..., dict[str, Tensor]]
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any]
    structure: Structure
    anatomy: Anatomy

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups."""
        return self.anatomy.groups


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return copy.deepcopy(net.state_dict())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def described() -> Iterator[Callable[[str], Described]]:
    """A case by name, described on first use; describing must not have changed it, nor any test since."""
    found: dict[str, tuple[Described, dict[str, Tensor]]] = {}

    def get(name: str) -> Described:
        if name not in found:
            build, inputs, call = nets.CASES[name]
            net = nets.seeded(build)
            before = state_of(net)
            structure, anatomy = describe(net, lambda model: call(model, inputs()))
            case = Described(net=net, inputs=inputs, call=call, structure=structure, anatomy=anatomy)
            found[name] = case, before
        return found[name][0]

    yield get
    assert all(same(case.net.state_dict(), before) for case, before in found.values())

"""What of a model can be compressed: its layers, its coupled channel groups, and what is left alone and why."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autocompress.compress.cut import Anatomy
from autocompress.compress.depth import find_blocks
from autocompress.compress.heads import find_heads
from autocompress.compress.watched import watched
from autocompress.compress.width import ChannelGroup, channel_groups
from autocompress.core.space import Group, Heads, Kind, Layer, Structure

Call = Callable[[nn.Module], Any]

KIND_OF: Mapping[type[nn.Module], Kind] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
_FOLDED = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def describe(model: nn.Module, call: Call) -> tuple[Structure, Anatomy]:
    """Find layers, channel groups, attention heads and residual blocks by running the model on a sample.

    Args:
        model: the user's model in eval mode; it is not changed.
        call: runs a model on a sample batch of the task and returns its output.

    Returns:
        The structure, and how to cut what is in it.
    """
    runs = _count_runs(model, call)
    left_alone: dict[str, str] = {}
    layers = []
    shared = _shared_parameters(model)
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = _reason_to_leave(name, module, runs[name], shared)
        if reason is None and type(module) in KIND_OF:
            weight = module.get_parameter("weight")
            layers.append(Layer(name=name, kind=KIND_OF[type(module)], shape=tuple(weight.shape), block=name))
        elif reason is not None:
            left_alone[name or "(the model itself)"] = reason
    groups, refused = channel_groups(model, call, {layer.name for layer in layers})
    heads, no_heads = find_heads(model, call)
    blocks, no_blocks = find_blocks(model, call)
    left_alone = {**no_blocks, **no_heads, **refused, **left_alone}
    structure = Structure(
        layers=_with_blocks(layers),
        groups=tuple(_value(g) for g in groups),
        heads=tuple(Heads(name=h.name, count=h.count) for h in heads),
        blocks=blocks,
        left_alone=left_alone,
    )
    return structure, Anatomy(groups=tuple(groups), heads=heads, blocks=blocks)


def _value(group: ChannelGroup) -> Group:
    layers = tuple(dict.fromkeys(cut.module for cut in group.cuts))
    return Group(name=group.name, width=group.width, step=group.partitions, layers=layers)


def _count_runs(model: nn.Module, call: Call) -> Counter[str]:
    """How often each module's forward ran on the sample, by name."""
    runs: Counter[str] = Counter()
    names = [name for name, _ in model.named_modules()]
    with watched(model, names, lambda name, *_: runs.update([name])), torch.no_grad():
        call(model)
    return runs


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names of parameters that are one tensor under several names, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _reason_to_leave(name: str, module: nn.Module, runs: int, shared: Mapping[int, list[str]]) -> str | None:
    for parameter in module.parameters(recurse=False):
        if id(parameter) in shared:
            others = [n for n in shared[id(parameter)] if not n.startswith(f"{name}.")] or shared[id(parameter)]
            return f"its weight is tied to {', '.join(others)}"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is re-parametrised"
    if isinstance(module, _FOLDED):
        return None
    if type(module) not in KIND_OF:
        return f"{type(module).__name__} is not a layer that can be compressed here"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:  # torch.nn.utils.weight_norm, spectral_norm and prune make it an attribute
        return "its weight is computed from other parameters"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}, not float32"
    if runs != 1:
        return "its forward did not run on the sample" if runs == 0 else f"it runs {runs} times in one forward"
    return None


def _with_blocks(layers: list[Layer]) -> tuple[Layer, ...]:
    """A layer's block is its smallest enclosing module that holds at least two layers, itself at the top level."""
    holders = Counter(prefix for layer in layers for prefix in _ancestors(layer.name))
    crowded = [{p for p in _ancestors(layer.name) if 1 < holders[p] < len(layers)} for layer in layers]
    blocks = [max(found, key=len, default=layer.name) for layer, found in zip(layers, crowded, strict=True)]
    return tuple(
        Layer(name=layer.name, kind=layer.kind, shape=layer.shape, block=block)
        for layer, block in zip(layers, blocks, strict=True)
    )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]

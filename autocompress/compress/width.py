"""Channel widths: coupled groups of a model, and cutting them.

The dependency graph and the slicing of each module type are torch-pruning's (Fang et al., DepGraph, CVPR 2023).
It is built once; every candidate is a copy of the original whose modules are sliced by the recorded indices.
A group is offered to the search only if cutting it is proven on the sample: the cut model must give what the
original gives with those channels' outgoing weights at zero.
"""

import bisect
import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from autocompress.core.errors import StageError

Call = Callable[[nn.Module], Any]
_NORMALISED = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One module that shrinks with a group: `index[i]` is the place in it of the group's channel `root[i]`."""

    module: str
    prune: Callable[[nn.Module, list[int]], Any]
    is_input: bool
    root: tuple[int, ...]
    index: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels that can only be cut together.

    Attributes:
        partitions: equal parts that must keep the same channels each (the groups of a grouped convolution).
        order: channels of one part, most important first (L2 norm of all coupled weights).
    """

    name: str
    width: int
    partitions: int
    order: tuple[int, ...]
    cuts: tuple[Cut, ...]

    def removed(self, width: int) -> set[int]:
        """The channels that go when `width` of them stay."""
        if width % self.partitions or not 0 < width <= self.width:
            raise StageError(
                "compress",
                f"group {self.name!r} has {self.width} channels in {self.partitions} parts: it cannot keep {width}",
            )
        part = self.width // self.partitions
        gone = self.order[width // self.partitions :]
        return {p * part + channel for p in range(self.partitions) for channel in gone}


def cut_widths(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    *,
    before: Mapping[str, int] | None = None,
) -> nn.Module:
    """A copy of `model` with the given width of each named group; the original is not changed.

    `before` are widths that the model was cut to already, each at least the one wanted now. Modules that are no longer
    in the model, with a block that was left out, need no cut.
    """
    model = copy.deepcopy(model)
    present = {name for name, _ in model.named_modules()}
    gone = _doomed(groups, before or {})
    for key, (cut, indices) in _doomed(groups, widths).items():
        missing = sorted(gone[key][1]) if key in gone else []
        left = sorted(i - bisect.bisect(missing, i) for i in indices.difference(missing))
        if left and cut.module in present:
            cut.prune(model.get_submodule(cut.module), left)
    return model


def _doomed(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> dict[tuple[str, str], tuple[Cut, set[int]]]:
    """Indices that go, by module and direction."""
    known = {group.name: group for group in groups}
    doomed: dict[tuple[str, str], tuple[Cut, set[int]]] = {}
    for name, width in widths.items():
        if name not in known:
            raise StageError("compress", f"there is no channel group {name!r} in the model")
        gone = known[name].removed(width)
        for cut in known[name].cuts:
            # One function serves both directions of modules whose outputs are their inputs: cut those once.
            key = (cut.module, cut.prune.__func__.__qualname__)  # type: ignore[attr-defined]
            _, indices = doomed.setdefault(key, (cut, set()))
            indices.update(i for r, i in zip(cut.root, cut.index, strict=True) if r in gone)
    return doomed


def channel_groups(model: nn.Module, call: Call, allowed: Collection[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be cut, and for each other one, by the name of its first layer, why not."""
    model = copy.deepcopy(model).requires_grad_(True)
    names = {module: name for name, module in model.named_modules()}
    try:
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=None, forward_fn=lambda m, _: call(m), verbose=False
        )
    except Exception as error:  # whatever a traced user model raises: widths stay, the search goes on
        return [], {"(all widths)": f"the dependency graph could not be built: {type(error).__name__}: {error}"}
    found, refused = _followed(graph, names)
    groups = []
    with torch.no_grad():
        expected = _flat(call(model.requires_grad_(False)))
    for raw in found:
        group = _group(raw, graph, names)
        if group.width < 2:
            continue
        outsiders = [c.module for c in group.cuts if _is_weighted(model, c.module) and c.module not in allowed]
        if outsiders:
            refused[group.name] = f"width kept: coupled with {outsiders[0]}, which is left alone"
        elif any(not isinstance(i.dep.target.module, nn.Module) for i in raw):
            refused[group.name] = "width kept: coupled with a bare parameter"
        elif reason := _reason_to_keep(model, call, group, expected):
            refused[group.name] = f"width kept: {reason}"
        else:
            groups.append(group)
    return groups, refused


def _followed(graph: Any, names: Mapping[nn.Module, str]) -> tuple[list[Any], dict[str, str]]:
    """Groups as the graph has them; and the first layers of those through which it cannot follow its channels.

    Its own `get_all_groups` ends with the first such group, as one behind a GRU is.
    """
    found, refused, seen = [], {}, set[nn.Module]()
    for module in list(graph.module2node):
        if module in seen or not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue
        pruner = graph.get_pruner_of_module(module)
        try:
            raw = graph.get_pruning_group(
                module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module)))
            )
        except Exception as error:  # whatever the graph makes of a user's operations: this width stays
            reason = f"{type(error).__name__}: {_first_line(error)}"
            refused[names[module]] = f"width kept: its channels could not be followed ({reason})"
            continue
        seen.update(i.dep.target.module for i in raw if graph.is_out_channel_pruning_fn(i.dep.handler))
        found.append(raw)
    return found, refused


def _is_weighted(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d | nn.Linear | nn.Embedding)


def _group(raw: Any, graph: Any, names: Mapping[nn.Module, str]) -> ChannelGroup:
    items = [item for item in raw if item.dep.target.module in names]
    cuts = tuple(
        Cut(
            module=names[item.dep.target.module],
            prune=item.dep.handler,
            is_input=graph.is_in_channel_pruning_fn(item.dep.handler)
            and not graph.is_out_channel_pruning_fn(item.dep.handler),
            root=tuple(item.root_idxs),
            index=tuple(item.idxs),
        )
        for item in items
    )
    width = len(items[0].idxs)
    partitions = math.lcm(*(_parts(item.dep.target.module) for item in items))
    if width % partitions:
        partitions = width
    importance = tp.importance.GroupMagnitudeImportance()(raw).detach().double()
    by_place = importance.view(partitions, -1).sum(0)
    order = sorted(range(len(by_place)), key=lambda i: (-float(by_place[i]), i))
    return ChannelGroup(name=cuts[0].module, width=width, partitions=partitions, order=tuple(order), cuts=cuts)


def _parts(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups < module.out_channels:
        return module.groups
    return 1


def _reason_to_keep(model: nn.Module, call: Call, group: ChannelGroup, expected: list[torch.Tensor]) -> str | None:
    """Why this group cannot be cut, None if cutting half of it does just what cutting means."""
    width = group.partitions * max(1, group.width // group.partitions // 2)
    if width == group.width:
        return "it cannot be halved"
    try:
        with torch.no_grad():
            actual = _flat(call(cut_widths(model, [group], {group.name: width})))
    except Exception as error:  # whatever the user's forward raises at another width is the answer
        return f"the model does not run with fewer of these channels ({type(error).__name__}: {_first_line(error)})"
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return "these channels are the model's output"
    if any(isinstance(model.get_submodule(cut.module), _NORMALISED) for cut in group.cuts):
        return None  # normalising over fewer channels is not the same as over zeros, and is meant
    with torch.no_grad():
        masked = _flat(call(_mask(model, group, group.removed(width))))
    scale = max(float(e.double().abs().max()) for e in expected) + 1e-6
    if any(
        float((a.double() - m.double()).abs().max()) > _TOLERANCE * scale for a, m in zip(actual, masked, strict=True)
    ):
        return "cutting channels is not the same as silencing them (heads, attention scale or a mix across channels)"
    return None


def _mask(model: nn.Module, group: ChannelGroup, gone: set[int]) -> nn.Module:
    """A copy whose consumers of the group do not listen to the channels in `gone`."""
    model = copy.deepcopy(model)
    for cut in group.cuts:
        module = model.get_submodule(cut.module)
        if not cut.is_input or not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue
        indices = sorted(i for r, i in zip(cut.root, cut.index, strict=True) if r in gone)
        groups = getattr(module, "groups", 1)
        if groups == 1:
            module.weight[:, indices] = 0
            continue
        rows, columns = len(module.weight) // groups, module.weight.shape[1]
        for i in indices:
            part, column = divmod(i, columns)
            module.weight[part * rows : (part + 1) * rows, column] = 0
    return model


def _flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in _flat(value)]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]

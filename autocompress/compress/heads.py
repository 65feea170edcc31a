"""Attention heads: which modules have them, which can do with fewer, and cutting them.

A module with an integer attribute for its number of heads and linear layers for queries, keys, values (one each, or
one for all three) and output is cut by rows of the first and columns of the last. torch's own MultiheadAttention has
its sizes baked in: it becomes an `Attention` first, which computes the same. What is offered is proven on the sample:
the cut module must give what the original gives with those heads' outputs silent (Michel et al., Are Sixteen Heads
Really Better than One?, 2019).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress.outputs import outputs_of
from autocompress.core.errors import StageError

Call = Callable[[nn.Module], Any]
COUNTS = ("num_heads", "n_heads", "heads", "nhead", "n_head", "num_attention_heads")
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """The heads of one module.

    Attributes:
        name: of the module.
        order: heads, most important first (L2 norm of all their weights).
        attribute: holds their number; empty for torch's MultiheadAttention.
        inputs: linear layers whose rows are the heads', by name in the module, with how many parts of them each has.
        output: linear layer whose columns are the heads'.
        sizes: further integer attributes that are the heads' width altogether.
    """

    name: str
    count: int
    order: tuple[int, ...]
    attribute: str
    inputs: Mapping[str, int]
    output: str
    sizes: tuple[str, ...] = ()


class Attention(nn.Module):
    """What torch's MultiheadAttention computes, with sizes that follow from its weights."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        """Take over weights and settings; the parameters are copies."""
        super().__init__()
        dim, heads = source.embed_dim, source.num_heads
        self.num_heads = heads
        self.head_dim = dim // heads
        self.batch_first = source.batch_first
        self.dropout = source.dropout
        if source._qkv_same_embed_dim:
            weights = source.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(w.detach() for w in (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight))
        bias: Tensor | None = source.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(source.out_proj.weight.detach(), source.out_proj.bias)
        # What torch's encoder asks before it takes a path of its own, for modules of its own.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False
        self.train(source.training).requires_grad_(False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002 (the weights are not given)
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As torch's, but without the attention weights."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask = _merged(attn_mask, key_padding_mask, q)
        causal = is_causal and mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None


def find_heads(model: nn.Module, call: Call) -> tuple[tuple[HeadGroup, ...], dict[str, str]]:
    """Modules whose heads can be cut, and for each other one that has some, why not.

    Args:
        call: runs a model on a sample of the task.
    """
    with torch.no_grad():
        expected = outputs_of(call(model))
    found, refused = [], {}
    for name, module in model.named_modules():
        group = _described(name, module)
        if isinstance(group, str):
            refused[name] = group
        elif group is not None:
            reason = _reason(model, call, group, expected)
            if reason is None:
                found.append(group)
            else:
                refused[name] = f"heads kept: {reason}"
    return tuple(found), refused


def cut_heads(model: nn.Module, groups: Sequence[HeadGroup], heads: Mapping[str, int]) -> None:
    """Keep so many heads of each named module, in place.

    Modules that are no longer in the model, with a block that was left out, need no cut. torch's own modules become
    `Attention` all together, cut or not: models that differ in their numbers of heads only have the same parts.

    Raises:
        StageError: there is no such module, or it has not that many heads.
    """
    known = {group.name: group for group in groups}
    for name, count in heads.items():
        if name not in known:
            raise StageError("compress", f"there are no attention heads to cut in {name!r}")
        if not 0 < count <= known[name].count:
            raise StageError("compress", f"{name!r} has {known[name].count} heads: it cannot keep {count}")
    present = {name for name, _ in model.named_modules()}
    for name, group in known.items():
        if heads and name in present:
            _cut(model, group, sorted(group.order[: heads.get(name, group.count)]))


def _described(name: str, module: nn.Module) -> HeadGroup | str | None:
    """The heads of a module; why they cannot be cut; None where it has none."""
    if isinstance(module, nn.MultiheadAttention):
        if not name:
            return "heads kept: the model itself cannot be replaced"
        if module.bias_k is not None or module.add_zero_attn:
            return "heads kept: it adds keys of its own"
        made = Attention(module)
        order = _order(made, module.num_heads, {"query": 1, "key": 1, "value": 1}, "out_proj")
        inputs = {"query": 1, "key": 1, "value": 1}
        return HeadGroup(name=name, count=module.num_heads, order=order, attribute="", inputs=inputs, output="out_proj")
    attribute = next((a for a in COUNTS if type(getattr(module, a, None)) is int), None)
    layers = {n: m for n, m in module.named_children() if type(m) is nn.Linear}
    if attribute is None or not layers:
        return None
    count = int(getattr(module, attribute))
    *first, (output, last) = layers.items()
    width = last.in_features
    parts = {n: m.out_features // width for n, m in first if m.out_features in (width, 3 * width)}
    if sum(parts.values()) != 3 or len(parts) < len(first):
        return "heads kept: its linear layers are not queries, keys, values and an output"
    if count < 2 or width % count:
        return f"heads kept: {width} channels are not cut into {count} heads"
    sizes = tuple(n for n, v in vars(module).items() if type(v) is int and v == width and n != attribute)
    order = _order(module, count, parts, output)
    return HeadGroup(name=name, count=count, order=order, attribute=attribute, inputs=parts, output=output, sizes=sizes)


def _order(module: nn.Module, count: int, inputs: Mapping[str, int], output: str) -> tuple[int, ...]:
    columns = module.get_submodule(output).get_parameter("weight").detach()
    total = columns.square().sum(0).view(count, -1).sum(1).double()
    for name, parts in inputs.items():
        rows = module.get_submodule(name).get_parameter("weight").detach().square().sum(1)
        total += rows.view(parts, count, -1).sum((0, 2))
    return tuple(sorted(range(count), key=lambda head: (-float(total[head]), head)))


def _cut(model: nn.Module, group: HeadGroup, kept: Sequence[int]) -> None:
    module = model.get_submodule(group.name)
    if isinstance(module, nn.MultiheadAttention):
        owner, _, leaf = group.name.rpartition(".")
        module = Attention(module)
        setattr(model.get_submodule(owner), leaf, module)
    attribute = group.attribute or "num_heads"
    columns = _places(module.get_submodule(group.output).in_features, group.count, kept)  # type: ignore[arg-type]
    for name, parts in group.inputs.items():
        layer: Any = module.get_submodule(name)
        size = layer.out_features // parts
        rows = torch.cat([columns + part * size for part in range(parts)])
        layer.weight = _kept(layer.weight, layer.weight.detach()[rows])
        if layer.bias is not None:
            layer.bias = _kept(layer.bias, layer.bias.detach()[rows])
        layer.out_features = len(rows)
    last: Any = module.get_submodule(group.output)
    last.weight = _kept(last.weight, last.weight.detach()[:, columns])
    last.in_features = len(columns)
    setattr(module, attribute, len(kept))
    for size_name in group.sizes:
        setattr(module, size_name, len(columns))


def _kept(old: nn.Parameter, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(rows.clone(), requires_grad=old.requires_grad)


def _places(width: int, count: int, kept: Sequence[int]) -> Tensor:
    return torch.arange(width).view(count, -1)[list(kept)].flatten()


def _reason(model: nn.Module, call: Call, group: HeadGroup, expected: Sequence[Tensor]) -> str | None:
    """Why these heads cannot be cut, None where cutting half of them does just what silencing them does."""
    kept = sorted(group.order[: max(1, group.count // 2)])
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    try:
        _cut(silent, group, range(group.count))
        with torch.no_grad():
            whole = outputs_of(call(silent))
            weight = silent.get_submodule(group.name).get_submodule(group.output).get_parameter("weight")
            gone = [head for head in range(group.count) if head not in kept]
            weight[:, _places(weight.shape[1], group.count, gone)] = 0
            wanted = outputs_of(call(silent))
            _cut(cut, group, kept)
            got = outputs_of(call(cut))
    except Exception as error:  # whatever the user's forward raises with fewer heads is the answer
        first = str(error).strip().split("\n")[0][:160]
        return f"the model does not run with fewer of them ({type(error).__name__}: {first})"
    if not _equal(whole, expected):
        return "the module computes something of its own with them"
    return None if _equal(got, wanted) else "cutting them is not the same as silencing them"


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if [o.shape for o in one] != [o.shape for o in other]:
        return False
    scale = max(float(o.abs().max()) for o in other) + 1e-6
    return all(float((a - b).abs().max()) <= _TOLERANCE * scale for a, b in zip(one, other, strict=True))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _merged(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as numbers to add to the scores, `[batch, heads or 1, queries, keys]`."""
    merged: Tensor | None = None
    for given, shape in ((mask, None), (padding, (q.shape[0], 1, 1, -1))):
        if given is None:
            continue
        number = given
        if not given.is_floating_point():
            number = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
        if shape is not None:
            number = number.view(*shape)
        elif number.ndim == 3:
            number = number.view(q.shape[0], -1, *number.shape[1:])
        merged = number if merged is None else merged + number
    return merged

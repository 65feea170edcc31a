"""The joint search space: rules a user writes, and the variables they become for one model on one device.

A variable is a name with a finite, ordered tuple of choices. Precision is chosen for the model's blocks, with an
override per layer, because contiguous integer regions are what runs fast. Widths are chosen per coupled group,
because channels that meet in an addition or a concatenation can only be cut together.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from autocompress.core.candidate import (
    Candidate,
    FloatPrecision,
    LayerChoice,
    SparsityName,
    parse_precision,
    parse_sparsity,
)
from autocompress.core.errors import ConfigError, unknown
from autocompress.core.profile import Profile
from autocompress.core.recipe import CALIBRATORS, DEFAULT_STAGES, Calibrator, Plan, Recipe

T = TypeVar("T")
Choice = str | int | float
Values = Mapping[str, Choice]
Kind = Literal["conv1d", "conv2d", "linear", "embedding"]
KINDS: tuple[str, ...] = ("conv1d", "conv2d", "linear", "embedding")
INHERIT = "block"
_FORBID = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A compressible layer of the user's model. `shape` is its weight's."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    block: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that can only be cut together; named after the first layer that produces them.

    Attributes:
        width: channels of the original model.
        step: widths are multiples of this (groups of a grouped convolution, say).
        layers: the layers whose weights shrink with it.
    """

    name: str
    width: int
    step: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Attention heads of one module."""

    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What of a model can be compressed, and what is left alone and why, by name.

    Attributes:
        blocks: residual blocks that can be left out.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    heads: tuple[Heads, ...] = ()
    blocks: tuple[str, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Choices for the layers that match: `name` is a glob, `kind` a list; of several rules the last one wins.

    Attributes:
        ranks: shares of a layer's full rank; 1 leaves it whole. Those that would not make it smaller are left out.
        factors: how convolutions of lower rank are split, see `LayerChoice`.
    """

    name: str = "*"
    kind: tuple[Kind, ...] = ()
    precisions: tuple[str, ...] | None = None
    sparsities: tuple[SparsityName, ...] | None = None
    ranks: tuple[float, ...] | None = None
    factors: Literal["channel", "spatial"] = "channel"

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        for text in self.precisions or ():
            parse_precision(text)
        for share in self.ranks or ():
            if not 0 < share <= 1:
                raise ConfigError(f"`ranks` must be shares of the full rank in (0, 1], got {share}")
        for name in self.sparsities or ():
            parse_sparsity(name)

    def matches(self, layer: Layer) -> bool:
        """Whether the rule speaks of this layer."""
        return fnmatch.fnmatchcase(layer.name, self.name) and (not self.kind or layer.kind in self.kind)


@dataclass(frozen=True, kw_only=True)
class WidthRule:
    """Ratios of the original width for the groups that match, rounded to the profile's multiple."""

    name: str = "*"
    ratios: tuple[float, ...]

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise ConfigError(f"`ratios` must be in (0, 1], got {ratio}")


@dataclass(frozen=True, kw_only=True)
class SpaceRules:
    """What a YAML file in search_spaces/ says.

    Attributes:
        precision_by: one precision per `block` with an override per layer, one per `layer`, or one per `model`.
        layers, widths: rules; of those that match the last one wins.
        heads: shares of a module's attention heads that are kept.
        skip: residual blocks that may be left out, as globs.
        recipes: ways to make a candidate; names of shipped ones in YAML, or what a file there would say. None means
            the default one.
        students: widths of the user's `student(width)`; only used where the task has one.
        calibrators: ways to find activation ranges.
        float_precisions: arithmetic for what is not integer; of these, what the profile has.
    """

    name: str
    description: str
    precision_by: Literal["block", "layer", "model"] = "block"
    layers: tuple[LayerRule, ...] = ()
    widths: tuple[WidthRule, ...] = ()
    students: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    skip: tuple[str, ...] = ()
    recipes: tuple[Plan, ...] = ()
    calibrators: tuple[Calibrator, ...] = ("minmax",)
    float_precisions: tuple[FloatPrecision, ...] = ("fp32", "bf16", "fp16")

    __pydantic_config__ = _FORBID

    def __post_init__(self) -> None:
        if not self.calibrators:
            raise ConfigError(f"`calibrators` must name at least one of {', '.join(CALIBRATORS)}")
        names = [plan.name for plan in self.recipes]
        if len(set(names)) < len(names):
            raise ConfigError(f"`recipes` must have a name of its own each, got {names}")
        for share in self.heads:
            if not 0 < share <= 1:
                raise ConfigError(f"`heads` must be shares in (0, 1], got {share}")
        for width in self.students:
            if not width > 0:
                raise ConfigError(f"`students` must be positive widths, got {width}")

    def resolve(self, structure: Structure, profile: Profile, *, has_student: bool = False) -> "Space":
        """The variables for this model on this device.

        Raises:
            ConfigError: a rule names a layer or a group that the model does not have.
        """
        self._check_names(structure)
        dropped: dict[str, str] = {}
        precisions: dict[str, tuple[str, ...]] = {}
        sparsities: dict[str, tuple[SparsityName, ...]] = {}
        ranks: dict[str, Ranks] = {}
        for layer in structure.layers:
            rules = [r for r in self.layers if r.matches(layer)]
            wanted = next((r.precisions for r in reversed(rules) if r.precisions is not None), ("fp32",))
            for p in wanted:
                if not profile.allows(layer.kind, p):
                    dropped[f"{p} for {layer.kind} layers"] = f"profile {profile.name} does not list it as paying there"
                elif (instead := profile.executable(p)) != p:
                    why = f"integer weights of more than {profile.integer_weight_bits} bits overflow in its kernels"
                    dropped[p] = f"{why}: {instead} instead"
            allowed = tuple(dict.fromkeys(profile.executable(p) for p in wanted if profile.allows(layer.kind, p)))
            precisions[layer.name] = allowed or ("fp32",)
            zeros = next((r.sparsities for r in reversed(rules) if r.sparsities is not None), (0.0,))
            if "2:4" in zeros and (unfit := _against_pattern(layer, profile)):
                dropped[f"2:4 for {layer.name}" if profile.sparse_kernels else "2:4"] = unfit
                zeros = tuple(z for z in zeros if z != "2:4") or (0.0,)
            sparsities[layer.name] = zeros
            ranks |= _ranks(layer, rules)
        widths = {
            g.name: choices
            for g in structure.groups
            if len(choices := _width_choices(g, self.widths, profile.width_multiple)) > 1
        }
        return Space(
            structure=structure,
            precision_by=self.precision_by,
            precisions=precisions,
            sparsities=sparsities,
            widths=widths,
            students=self.students if has_student else (),
            ranks=ranks,
            heads={h.name: counts for h in structure.heads if len(counts := _head_choices(h, self.heads)) > 1},
            skippable=tuple(b for b in structure.blocks if any(fnmatch.fnmatchcase(b, glob) for glob in self.skip)),
            recipes=self.recipes or (Plan(name="default"),),
            calibrators=self.calibrators,
            float_precisions=tuple(p for p in profile.float_precisions if p in (*self.float_precisions, "fp32")),
            dropped=dropped,
            executable={p: profile.executable(p) for rule in self.layers for p in rule.precisions or ()},
        )

    def _check_names(self, structure: Structure) -> None:
        layers = {layer.name for layer in structure.layers}
        groups = {group.name for group in structure.groups}
        for glob in self.skip:
            if glob != "*" and not fnmatch.filter(structure.blocks, glob):
                raise ConfigError(f"space {self.name!r}: {unknown('residual block', glob, structure.blocks)}")
        for rules, names, what in ((self.layers, layers, "layer"), (self.widths, groups, "channel group")):
            for rule in rules:
                if rule.name != "*" and not fnmatch.filter(names, rule.name):
                    raise ConfigError(f"space {self.name!r}: {unknown(what, rule.name, names)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Ranks of one layer, the full one first, and how it is split where it has fewer."""

    choices: tuple[int, ...]
    factors: Literal["channel", "spatial"] = "channel"


@dataclass(frozen=True, kw_only=True)
class Space:
    """The variables of one search.

    Attributes:
        precisions, sparsities: allowed choices by layer.
        widths: allowed widths by group, descending, the original first.
        ranks: allowed ranks by layer, the full one first, and how it is split.
        heads: allowed numbers of attention heads by module, the original first.
        skippable: residual blocks that may be left out.
        recipes: ways to make a candidate.
        dropped: choices the rules ask for and the device does not pay for, with the reason.
        float_unpaid: arithmetic that the device has and that is not searched, since it is not faster there.
        executable: for each precision of the rules, the one that stands for it on this device.
    """

    structure: Structure
    precision_by: Literal["block", "layer", "model"]
    precisions: Mapping[str, tuple[str, ...]]
    sparsities: Mapping[str, tuple[SparsityName, ...]]
    widths: Mapping[str, tuple[int, ...]]
    students: tuple[float, ...]
    calibrators: tuple[Calibrator, ...]
    dropped: Mapping[str, str]
    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skippable: tuple[str, ...] = ()
    recipes: tuple[Plan, ...] = (Plan(name="default"),)
    float_precisions: tuple[FloatPrecision, ...] = ("fp32",)
    float_unpaid: tuple[FloatPrecision, ...] = ()
    executable: Mapping[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, tuple[Choice, ...]]:
        """All variables with more than one choice, by name."""
        found: dict[str, tuple[Choice, ...]] = {}
        if self.students:
            found["student"] = (0.0, *self.students)
        found |= {f"width:{group}": choices for group, choices in self.widths.items()}
        found |= {f"heads:{name}": counts for name, counts in self.heads.items()}
        found |= {f"skip:{name}": (0, 1) for name in self.skippable}
        found |= {f"rank:{name}": ranks.choices for name, ranks in self.ranks.items()}
        members = self.members
        for block, names in members.items():
            found[f"precision:{block}"] = _union(self.precisions[n] for n in names)
            found[f"sparsity:{block}"] = _union(self.sparsities[n] for n in names)
            if self.precision_by == "block" and len(names) > 1:
                found |= {f"layer:{n}": (INHERIT, *self.precisions[n]) for n in names if len(self.precisions[n]) > 1}
        found["float"] = self.float_precisions
        found["calibrator"] = self.calibrators
        found["recipe"] = tuple(plan.name for plan in self.recipes)
        return {name: choices for name, choices in found.items() if len(choices) > 1}

    def decode(self, values: Values, *, recover_steps: int = 0) -> Candidate:
        """The candidate that `values` means; a variable not given takes its first choice."""
        student = float(values.get("student", 0.0)) or None
        layers: dict[str, LayerChoice] = {}
        for block, names in self.members.items():
            shared = values.get(f"precision:{block}")
            for name in names:
                own = values.get(f"layer:{name}", INHERIT)
                picked = str(shared if own == INHERIT else own)
                precision = picked if picked in self.precisions[name] else self.precisions[name][0]
                zeros = next((z for z in self.sparsities[name] if z == values.get(f"sparsity:{block}", 0.0)), 0.0)
                layers[name] = replace(
                    parse_precision(precision), sparsity=parse_sparsity(zeros), **self._rank(name, values)
                )
        widths = {g: int(values[f"width:{g}"]) for g in self.widths if f"width:{g}" in values}
        full = {g.name: g.width for g in self.structure.groups}
        integer = any(choice.kernel == "int8" for choice in layers.values())
        calibrator = values.get("calibrator", self.calibrators[0]) if integer else "minmax"
        heads = {n: int(values.get(f"heads:{n}", counts[0])) for n, counts in self.heads.items()}
        plan = next((p for p in self.recipes if p.name == values.get("recipe")), self.recipes[0])
        return Candidate(
            student=student,
            widths={} if student else {g: w for g, w in widths.items() if w != full[g]},
            heads={} if student else {n: count for n, count in heads.items() if count != self.heads[n][0]},
            skipped=() if student else tuple(n for n in self.skippable if values.get(f"skip:{n}") == 1),
            layers=layers,
            float_precision=self._float_precision(values),
            recipe=Recipe(
                calibrator=_calibrator(calibrator), recover_steps=recover_steps, name=plan.name, stages=plan.stages
            ),
        )

    def _rank(self, name: str, values: Values) -> dict[str, Any]:
        """Fields of a layer's choice; nothing for the full rank, and for a student, whose layers are others."""
        ranks = self.ranks.get(name)
        rank = values.get(f"rank:{name}")
        if ranks is None or values.get("student") or rank not in ranks.choices[1:]:
            return {}
        return {"rank": int(rank), "factors": ranks.factors}

    def uniform(self, precision: str, width_ratio: float = 1.0, sparsity: float = 0.0) -> dict[str, Choice]:
        """Values for one policy everywhere: `precision` where allowed, widths nearest to `width_ratio`."""
        precision = self.executable.get(precision, precision)
        values: dict[str, Choice] = {}
        for name, choices in self.variables.items():
            kind, _, rest = name.partition(":")
            if kind == "precision":
                values[name] = precision if precision in choices else choices[0]
            elif kind == "width":
                target = width_ratio * self.widths[rest][0]
                values[name] = min(self.widths[rest], key=lambda w: abs(w - target))
            elif kind in ("heads", "rank"):
                values[name] = choices[0]
            elif kind == "sparsity":
                values[name] = min(self.sparsity_choices(rest), key=lambda s: abs(_share(s) - sparsity))
            else:
                values[name] = choices[0]
        return values

    def uniform_float(self, precision: FloatPrecision) -> dict[str, Choice]:
        """Values for the original in one float precision."""
        values = self.uniform("fp32")
        return values | ({"float": precision} if "float" in values and precision in self.float_precisions else {})

    def _float_precision(self, values: Values) -> FloatPrecision:
        found = str(values.get("float", self.float_precisions[0]))
        return next((p for p in self.float_precisions if p == found), self.float_precisions[0])

    def sparsity_choices(self, block: str) -> tuple[SparsityName, ...]:
        """The sparsities of a block's layers."""
        return _union(self.sparsities[n] for n in self.members[block])

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the layers that share a precision and a sparsity, by the block that stands in these variables."""
        blocks: dict[str, list[str]] = {}
        for layer in self.structure.layers:
            key = {"model": "all", "layer": layer.name, "block": layer.block}[self.precision_by]
            blocks.setdefault(key, []).append(layer.name)
        return blocks


def _ranks(layer: Layer, rules: Sequence[LayerRule]) -> dict[str, Ranks]:
    """Ranks that make a layer smaller, its full rank first; nothing where there is no choice."""
    ruling = next((r for r in reversed(rules) if r.ranks is not None), None)
    if ruling is None or ruling.ranks is None or layer.kind not in ("linear", "conv1d", "conv2d"):
        return {}
    out, into, *kernel = layer.shape
    if ruling.factors == "spatial" and len(kernel) == 2:
        rows, columns = into * kernel[0], out * kernel[1]
    else:
        rows, columns = into * math.prod(kernel), out
    full, even = min(rows, columns), rows * columns / (rows + columns)
    fewer = {r for share in ruling.ranks if 1 <= (r := round(share * full)) < min(full, even)}
    if not fewer:
        return {}
    return {layer.name: Ranks(choices=(full, *sorted(fewer, reverse=True)), factors=ruling.factors)}


def _head_choices(heads: Heads, shares: Sequence[float]) -> tuple[int, ...]:
    found = {max(1, round(share * heads.count)) for share in shares}
    return tuple(sorted(found | {heads.count}, reverse=True))


def with_stages_that_pay(space: Space) -> Space:
    """The space without stages of recipes that are for choices it no longer has; `dropped` says which."""
    cuts = bool(
        space.widths or space.heads or space.skippable or space.ranks or space.students
        or any(len(zeros) > 1 or zeros != (0.0,) for zeros in space.sparsities.values())
    )  # fmt: skip
    bits = any(p != "fp32" for choices in space.precisions.values() for p in choices)
    plans, dropped = [], {}
    for plan in space.recipes:
        idle = [
            stage.name
            for stage in plan.stages
            if stage.when == "pays" and not ((stage.prune and cuts) or (stage.quantize and bits))
        ]
        for name in idle:
            dropped[f"stage {name!r} of recipe {plan.name!r}"] = "none of its choices pays on this device"
        kept = tuple(stage for stage in plan.stages if stage.name not in idle)
        plans.append(replace(plan, stages=kept or DEFAULT_STAGES))
    return replace(space, recipes=tuple(plans), dropped={**space.dropped, **dropped})


def _share(name: SparsityName) -> float:
    zeros = parse_sparsity(name)
    return zeros.ratio if zeros else 0.0


def _against_pattern(layer: Layer, profile: Profile) -> str | None:
    """Why a layer cannot be 2:4 sparse on this device, None where it can."""
    if not profile.sparse_kernels:
        return f"profile {profile.name} has no kernels that skip its zeros"
    if layer.kind == "embedding" or layer.shape[1] % 4:
        return "it needs input channels in fours"
    return None


def _calibrator(value: object) -> Calibrator:
    for known in CALIBRATORS:
        if value == known:
            return known
    raise ConfigError(unknown("calibrator", str(value), CALIBRATORS))


def _union(choices: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(c for group in choices for c in group))


def _width_choices(group: Group, rules: Sequence[WidthRule], multiple: int) -> tuple[int, ...]:
    matching = [r for r in rules if fnmatch.fnmatchcase(group.name, r.name)]
    if not matching:
        return (group.width,)
    step = math.lcm(group.step, multiple)
    found = {group.width}
    for ratio in matching[-1].ratios:
        width = step * max(1, round(ratio * group.width / step))
        if width < group.width:
            found.add(width)
    return tuple(sorted(found, reverse=True))

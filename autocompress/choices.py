"""Which precisions, float arithmetic and zeros pay for one model on one device.

Every comparison is of whole models, since what a layer costs depends on its neighbours: an integer layer among float
ones pays for the way there and back. Every choice is first tried on all layers, beside fp32 and all the others. One
that is slower there is tried on each family of layers, and the fastest one on all layers but those of one shape.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from autocompress.bench import Bench
from autocompress.core.candidate import (
    Candidate,
    FloatPrecision,
    LayerChoice,
    SparsityName,
    parse_precision,
    parse_sparsity,
)
from autocompress.core.measurement import Interval, separated
from autocompress.core.probe import Effect, Finding, Verdict, sparse
from autocompress.core.profile import Profile
from autocompress.core.space import Layer

if TYPE_CHECKING:
    from torch import nn

    from autocompress.progress import Progress
    from autocompress.task import CheckedTask

# Where so many zeros win nothing, fewer do not either, and are not tried.
SPARSITIES: tuple[SparsityName, ...] = (0.9, 0.5)
# An error with a quarter of the outputs' power is a wrong result, not a rounded one: 8 bits everywhere gave 36 dB and
# more, kernels that overflow a negative figure.
LEAST_SQNR_DB = 6.0
FP32: Interval = (1.0, 1.0)

Key = TypeVar("Key", bound=Hashable)
Names = tuple[str, ...]
Policy = Mapping[str, LayerChoice]


class Choices:
    """Tries the choices of one profile on one model.

    Attributes:
        findings: every comparison.
        verdicts: what follows; of several on one choice and layer the last one holds.
        left_out: what there was no time for.
    """

    def __init__(self, task: "CheckedTask", bench: Bench, progress: "Progress") -> None:
        """`bench` is of the task's whole model."""
        self.findings: list[Finding] = []
        self.verdicts: list[Verdict] = []
        self.left_out: list[str] = []
        self._bench = bench
        self._progress = progress
        self._layers = bench.builder.structure.layers
        self._families, self._shapes = _alike(task, self._layers)
        self._policies: dict[str, Policy] = {"fp32": {}}
        self._speed: dict[str, Interval] = {"fp32": FP32}

    def extremes(self) -> dict[str, Policy]:
        """fp32 and, last, the fastest precision, by name: the choice of each layer."""
        return {name: self._policies[name] for name in ("fp32", self._fastest())}

    def measure(self, deadline: float) -> None:
        """Try what the profile lists; nothing is begun after `deadline`, on time.monotonic().

        Raises:
            StageError: fp32 fails.
        """
        for name, act in self._steps():
            if time.monotonic() >= deadline:
                self.left_out.append(name)
                continue
            self._progress.stage(f"probing {name}")
            act()

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "precisions", self._precisions
        for arithmetic in self._bench.profile.float_precisions:
            if arithmetic != "fp32":
                yield arithmetic, partial(self._arithmetic, arithmetic)
        for zeros in (*SPARSITIES, "2:4") if self._bench.profile.sparse_kernels else SPARSITIES:
            if zeros == "2:4" or all(v.faster for v in self.verdicts if v.choice.startswith("sparsity")):
                yield sparse(zeros), partial(self._zeros, zeros)
        yield "shapes of layers", self._shape_by_shape

    def _precisions(self) -> None:
        """Each on all layers that may have it; where another one is faster there, on each family by itself."""
        allowed = {layer.name: _allowed(layer, self._bench.profile) for layer in self._layers}
        names = _finest_first(p for found in allowed.values() for p in found)
        where = {p: tuple(layer for layer, found in allowed.items() if p in found) for p in names}
        whole = self._compare("fp32", {p: (p, layers) for p, layers in where.items()})
        rivals = {p: self._rival(p, layers, whole[p]) for p, layers in where.items()}
        apart = [p for p in where if not _as_fast(whole[p], self._speed[rivals[p]])]
        tried = {
            (q, family): (q, members)
            for p in apart
            for q in sorted({p, rivals[p]} - {"fp32"})
            for family, members in _among(self._families, where[q]).items()
        }
        alone = self._compare("fp32", tried)
        for p, layers in where.items():
            if p not in apart:
                self.verdicts.append(_verdict(p, layers, whole[p], rivals[p], self._speed[rivals[p]]))
                continue
            for family, members in _among(self._families, layers).items():
                rival = alone.get((rivals[p], family))
                beside = rival.ratio_ci if isinstance(rival, Effect) else FP32
                self.verdicts.append(_verdict(p, members, alone[p, family], rivals[p], beside))

    def _rival(self, precision: str, layers: Names, whole: Effect | str) -> str:
        """The fastest of those that are as precise; one that is faster than that is a rival of the next ones."""
        choice = parse_precision(precision)
        rival = min((q for q in self._speed if _as_fine(parse_precision(q), choice)), key=lambda q: self._speed[q][1])
        if isinstance(whole, Effect) and separated(whole.ratio_ci, self._speed[rival]) and _right(whole):
            self._policies[precision] = dict.fromkeys(layers, choice)
            self._speed[precision] = whole.ratio_ci
        return rival

    def _shape_by_shape(self) -> None:
        """Verdicts against shapes without which the fastest precision is faster, and which alone win nothing."""
        fastest = self._fastest()
        whole = self._policies[fastest]
        shapes = _among(self._shapes, tuple(whole))
        if len(shapes) < 2:
            return
        without = {n: ("fp32", members) for n, members in shapes.items()}
        found = self._compare(fastest, without)
        hurt = {n: (fastest, shapes[n]) for n, e in found.items() if isinstance(e, Effect) and e.faster}
        for name, effect in self._compare("fp32", hurt).items():
            if not (isinstance(effect, Effect) and effect.faster):
                self.verdicts.append(_verdict(fastest, shapes[name], effect, "fp32", FP32))

    def _arithmetic(self, precision: FloatPrecision) -> None:
        """All that is not integer in another arithmetic."""
        made = {n: Candidate(layers=policy, float_precision=precision) for n, policy in self.extremes().items()}
        self._everywhere(precision, (), made)

    def _zeros(self, zeros: SparsityName) -> None:
        """Zeros in every layer but tables, and for a pattern, but those whose channels it does not fit."""
        fits = (n for n in self._layers if n.kind != "embedding" and (zeros != "2:4" or n.shape[1] % 4 == 0))
        names, sparsity = tuple(layer.name for layer in fits), parse_sparsity(zeros)
        made = {}
        for beside, policy in self.extremes().items():
            layers = {name: replace(policy.get(name, LayerChoice()), sparsity=sparsity) for name in names}
            made[beside] = Candidate(layers={**policy, **layers})
        self._everywhere(sparse(zeros), names, made)

    def _everywhere(self, choice: str, layers: Names, made: Mapping[str, Candidate]) -> None:
        """A choice for the whole model, beside fp32 and beside the fastest precision: it may pay in either."""
        found: list[Verdict] = []
        for name, policy in self.extremes().items():
            effect = self._bench.compare(Candidate(layers=policy), {choice: made[name]}, right=True)[choice]
            self.findings.append(Finding(choice=choice, layers=layers, beside=name, effect=effect))
            found.append(_verdict(choice, layers, effect, f"{name} without it", FP32))
        best = max(found, key=lambda verdict: (verdict.faster, verdict.usable))
        self.verdicts.append(replace(best, smaller=any(verdict.smaller for verdict in found)))

    def _compare(self, base: str, tried: Mapping[Key, tuple[str, Names]]) -> dict[Key, Effect | str]:
        """The effect of each precision on its layers in a model that is `base` otherwise."""
        policy = self._policies[base]
        made = {
            key: Candidate(layers={**policy, **dict.fromkeys(layers, parse_precision(precision))})
            for key, (precision, layers) in tried.items()
        }
        found = self._bench.compare(Candidate(layers=policy), made, right=base == "fp32") if made else {}
        for key, effect in found.items():
            precision, layers = tried[key]
            self.findings.append(Finding(choice=precision, layers=layers, beside=base, effect=effect))
        return found

    def _fastest(self) -> str:
        return min(self._speed, key=lambda name: self._speed[name][1])


def _verdict(choice: str, layers: Names, effect: Effect | str, rival: str, of_rival: Interval) -> Verdict:
    """What follows from an effect beside fp32, and from that of the fastest choice that is as fine."""
    if isinstance(effect, str):
        return Verdict(choice=choice, layers=layers, usable=False, faster=False, smaller=False, why=effect)
    low, high = effect.ratio_ci
    slower = f"not faster than {rival}: {effect.ratio:.2f} ({low:.2f} to {high:.2f})"
    if of_rival != FP32:
        slower += f" of fp32's latency, that {of_rival[0]:.2f} to {of_rival[1]:.2f}"
    else:
        slower += " of its latency"
    wrong = not _right(effect) and not choice.startswith("sparsity")
    return Verdict(
        choice=choice,
        layers=layers,
        usable=not wrong,
        faster=separated(effect.ratio_ci, of_rival),
        smaller=effect.size_ratio < 1,
        why=f"wrong results, {effect.sqnr_db:.1f} dB to fp32" if wrong else slower,
    )


def _right(effect: Effect) -> bool:
    return effect.sqnr_db is None or effect.sqnr_db >= LEAST_SQNR_DB


def _as_fast(effect: Effect | str, rival: Interval) -> bool:
    """Whether a choice on all layers builds, is right, and is not slower: then it is so on each family of them."""
    return isinstance(effect, Effect) and _right(effect) and not separated(rival, effect.ratio_ci)


def _among(groups: Mapping[str, Names], layers: Names) -> dict[str, Names]:
    """The groups with those of their members that are in `layers`, empty ones left out."""
    found = {name: tuple(member for member in members if member in layers) for name, members in groups.items()}
    return {name: members for name, members in found.items() if members}


def _allowed(layer: Layer, profile: Profile) -> Names:
    """The precisions that the profile lists for a layer, as they are executed."""
    return tuple(dict.fromkeys(profile.executable(p) for p in profile.precisions.get(layer.kind, ()) if p != "fp32"))


def _fineness(choice: LayerChoice) -> tuple[int, bool, int]:
    return choice.activation_bits, choice.dynamic or choice.activation_bits == 32, choice.weight_bits


def _finest_first(precisions: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(precisions), key=lambda p: _fineness(parse_precision(p)), reverse=True)


def _as_fine(one: LayerChoice, other: LayerChoice) -> bool:
    """Whether the first is at least as precise as the second in every respect."""
    return all(a >= b for a, b in zip(_fineness(one), _fineness(other), strict=True))


def _alike(task: "CheckedTask", layers: Sequence[Layer]) -> tuple[dict[str, Names], dict[str, Names]]:
    """Layers by family (their kind, depthwise ones apart), and by shape: of weights, input and output."""
    families: dict[str, list[str]] = {}
    shapes: dict[str, list[str]] = {}
    sizes = _sizes(task, [layer.name for layer in layers])
    for layer in layers:
        module = task.model.get_submodule(layer.name)
        groups = getattr(module, "groups", 1)
        family = f"depthwise {layer.kind}" if 1 < groups == getattr(module, "in_channels", 0) else layer.kind
        families.setdefault(family, []).append(layer.name)
        shape = f"{family} {list(layer.shape)} in {groups} groups, {sizes.get(layer.name)}"
        shapes.setdefault(shape, []).append(layer.name)
    return {n: tuple(ls) for n, ls in families.items()}, {n: tuple(ls) for n, ls in shapes.items()}


def _sizes(task: "CheckedTask", names: Sequence[str]) -> dict[str, str]:
    """For each layer, the shapes of its input and output for one item."""
    import torch

    from autocompress.compress.watched import watched

    found: dict[str, str] = {}

    def note(name: str, _: "nn.Module", inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[name] = f"{list(inputs[0].shape)} to {list(output.shape)}"

    with watched(task.model, names, note), torch.no_grad():
        task.call(task.model, task.batch("calibration", [0])[0])
    return found

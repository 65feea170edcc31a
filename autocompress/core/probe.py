"""What a probe found out about one model on one device: which choices pay there, and where its width stairs are.

Latencies are ratios to the same model without the choice, timed beside it. A choice pays where it is faster than
every more precise one, or, where bytes count, in a smaller file. A width is an edge where it is the widest of those
that run equally fast.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autocompress.core.candidate import SparsityName
from autocompress.core.measurement import Interval
from autocompress.core.profile import Profile
from autocompress.core.record import to_json
from autocompress.core.space import Space, Structure

NAMED = 3  # layers named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a choice does to a model: figures over those of the model it was compared with.

    Attributes:
        sqnr_db: power of fp32's outputs over that of the difference to them, decibels; None where they are equal, or
            were not compared.
    """

    ratio: float
    ratio_ci: Interval
    size_ratio: float
    sqnr_db: float | None

    @property
    def faster(self) -> bool:
        """Whether the whole interval is below 1."""
        return self.ratio_ci[1] < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One comparison: `layers` with `choice` in a model that is otherwise as `beside` says.

    `effect` is a sentence where it could not be built, run or timed.
    """

    choice: str
    layers: tuple[str, ...]
    beside: str
    effect: Effect | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether `choice` is worth trying on `layers` (all, where none is named).

    Attributes:
        usable: it builds, runs, and its outputs are near fp32's.
        faster: than every more precise choice, there or in some surroundings of theirs.
        smaller: its file is.
        why: a clause for who asks why not.
    """

    choice: str
    layers: tuple[str, ...] = ()
    usable: bool
    faster: bool
    smaller: bool
    why: str

    def pays(self, size_counts: bool) -> bool:
        """Whether it is worth a trial, when bytes count or not."""
        return self.usable and (self.faster or (size_counts and self.smaller))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stair:
    """The widths of groups that are alike.

    Attributes:
        groups: their names.
        module: the part of the model that was timed; empty for all of it.
        precision: of its layers meanwhile, the fastest one of the device.
        widths: those timed, descending, the original first.
        ratios: for each width, latency over that of the original width.
        edges: of the widths, the widest of each plateau.
    """

    groups: tuple[str, ...]
    module: str
    precision: str
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    edges: tuple[int, ...]

    def snap(self, width: int) -> int:
        """The edge of the plateau that `width` stands on; a width that is on none that is known stays."""
        edge = min((e for e in self.edges if e >= width), default=width)
        below = max((e for e in self.edges if e < edge), default=0)
        plateau = [w for w in self.widths if below < w < edge]
        return edge if plateau and min(plateau) <= width else width


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The record of one probe.

    Attributes:
        subject: digest of model, runtime and options; another one makes it void (see `subject`).
        fingerprint: facts of the device; another one makes it void too.
        created: UTC, ISO 8601.
        verdicts: what a search uses, with `stairs`; of several on one choice and layer the last one holds.
        findings: what they rest on.
        left_out: what there was no time for; a search treats it as if nothing were known.
    """

    task: str
    target: str
    subject: str
    fingerprint: Mapping[str, str]
    created: str
    seconds: float
    verdicts: tuple[Verdict, ...] = ()
    stairs: tuple[Stair, ...] = ()
    findings: tuple[Finding, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Payoff:
    """A probe as a search asks it. `size_counts`: whether a smaller file is worth something by itself."""

    probe: Probe
    size_counts: bool

    def against(self, choice: str, layer: str = "") -> str | None:
        """Why `choice` is not worth trying on a layer, None where it is or nothing is known."""
        for verdict in reversed(self.probe.verdicts):
            if verdict.choice == choice and (not verdict.layers or layer in verdict.layers):
                return None if verdict.pays(self.size_counts) else verdict.why
        return None

    def against_sparsity(self, name: SparsityName, layer: str) -> str | None:
        """The same for zeros: more of them would not be slower, so the next share measured above decides."""
        if isinstance(name, str):
            return self.against(sparse(name), layer)
        known = [r for v in self.probe.verdicts if (r := _share(v.choice)) is not None and r >= name]
        return self.against(sparse(min(known)), layer) if known and name > 0 else None

    def snap(self, group: str, width: int) -> int:
        """The widest width that runs as fast, as far as that is known."""
        return next((stair.snap(width) for stair in self.probe.stairs if group in stair.groups), width)


def paying(space: Space, payoff: Payoff) -> Space:
    """The space without what was measured not to pay: `dropped` says what that is, and why.

    Widths move up to the edge of the plateau they stand on. A layer keeps its choice of fp32 in any case, and what
    the float arithmetic of a baseline is, stays a baseline.
    """
    refused: dict[tuple[str, str], list[str]] = {}

    def keep(name: str, choice: str, why: str | None) -> bool:
        if why is not None:
            refused.setdefault((choice, why), []).append(name)
        return why is None

    precisions = {
        layer: tuple(p for p in choices if p == "fp32" or keep(layer, p, payoff.against(p, layer))) or ("fp32",)
        for layer, choices in space.precisions.items()
    }
    sparsities = {
        layer: tuple(s for s in choices if keep(layer, sparse(s), payoff.against_sparsity(s, layer))) or (0.0,)
        for layer, choices in space.sparsities.items()
    }
    floats = tuple(p for p in space.float_precisions if p == "fp32" or keep("", p, payoff.against(p)))
    widths = {group: tuple(dict.fromkeys(payoff.snap(group, w) for w in ws)) for group, ws in space.widths.items()}
    dropped = {f"{choice}{named(names)}": why for (choice, why), names in refused.items()}
    for group, choices in space.widths.items():
        if gone := [str(w) for w in choices if w not in widths[group]]:
            dropped[f"width {', '.join(gone)} of {group}"] = "no faster than the next wider one"
    return replace(
        space,
        precisions=precisions,
        sparsities=sparsities,
        widths={group: choices for group, choices in widths.items() if len(choices) > 1},
        float_precisions=floats,
        float_unpaid=tuple(p for p in space.float_precisions if p not in floats),
        dropped={**space.dropped, **dropped},
    )


def named(names: Sequence[str]) -> str:
    """` of a, b and 3 more layers`, nothing for what is no layer's."""
    if not any(names):
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" of {', '.join(names[:NAMED])}{more}"


def sparse(name: SparsityName) -> str:
    """A sparsity as the name of a choice."""
    return f"sparsity {name if isinstance(name, str) else format(name, 'g')}"


def _share(choice: str) -> float | None:
    """The share of zeros that a choice's name says, None for a pattern or another kind of choice."""
    word, _, number = choice.partition(" ")
    return float(number) if word == "sparsity" and ":" not in number else None


def subject(structure: Structure, inputs: Mapping[str, tuple[int, ...]], profile: Profile) -> str:
    """Digest of what a probe's figures depend on besides the device: shapes, runtime and its options.

    Args:
        inputs: shapes of an item, by name.
    """
    parts = [
        to_json(structure.layers),
        to_json(structure.groups),
        to_json(inputs),
        [profile.runtime, profile.format, profile.dialect, to_json(profile.options), profile.measure.threads],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""Two models of which the large one answers only where the small one is unsure, in the place of one."""

import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from autocompress.core.artifact import Artifact, TensorSpec
from autocompress.core.errors import InputError
from autocompress.core.measurement import Interval, Measurement
from autocompress.core.record import from_json, to_json
from autocompress.core.trial import Score, Trial

# Of a cascade's outputs on a device: for each item, whether the large model answered.
LARGE = "cascade.large"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The small model answers where its confidence reaches `threshold`.

    Attributes:
        output: name of the output that holds one row of class scores an item.
        kind: what confidence is, as `core.confidence.confidence` tells it.
    """

    output: str
    kind: Literal["probability", "margin"]
    threshold: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise InputError(f"`threshold` must be a finite number, got {self.threshold}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """Two files and a rule, which a host takes wherever it takes an artifact. Paths as there."""

    small: Artifact
    large: Artifact
    rule: Rule

    def __post_init__(self) -> None:
        for one, other in ((self.small.inputs, self.large.inputs), (self.small.outputs, self.large.outputs)):
            if [spec.name for spec in one] != [spec.name for spec in other]:
                raise InputError(
                    "the models of a cascade must have the same inputs and outputs, "
                    f"got {_named(one)} and {_named(other)}"
                )

    @property
    def path(self) -> str:
        """Both names, for messages."""
        return f"{PurePath(self.small.path).name} then {PurePath(self.large.path).name}"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As of both."""
        return self.small.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """As of both."""
        return self.small.outputs

    @property
    def size_bytes(self) -> int:
        """Size of both files."""
        return self.small.size_bytes + self.large.size_bytes

    @property
    def key(self) -> str:
        """Names what is run: a SHA-256 of both files, their options and the rule."""
        said = json.dumps([self.small.key, self.large.key, to_json(self.rule)])
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def sha256(self) -> str:
        """The key: it stands in measurements where a file's hash does."""
        return self.key

    @property
    def in_full(self) -> "Cascade":
        """The same with every item through both models: what it takes at most."""
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, threshold=sys.float_info.max))

    @property
    def dynamic_batch(self) -> bool:
        """Whether both take any batch size."""
        return self.small.dynamic_batch and self.large.dynamic_batch


Runnable = Artifact | Cascade


def runnable_from_json(data: Any) -> Runnable:
    """An artifact or a cascade from its JSON form."""
    return from_json(Cascade, data) if "rule" in data else from_json(Artifact, data)


def files_of(what: Runnable) -> tuple[Artifact, ...]:
    """The files that run."""
    return (what.small, what.large) if isinstance(what, Cascade) else (what,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """A trial alone. `ratio` is latency over fp32's."""

    trial: int
    ratio: float
    ratio_ci: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeRecord:
    """A cascade of two trials: what was expected of it, and what was measured. Accuracies are on validation.

    Attributes:
        expected_share, share: of the items that the large model answers, 0 to 1: as the members' outputs say, and as
            it was when the cascade ran.
        expected_accuracy: of the members' outputs, joined.
        expected_latency_ms: the small one's measured latency + `expected_share` × the large one's.
        score: the cascade's own figures, end to end; `size_bytes` is that of both files.
        measurement: raw samples behind `score`: items in the mixture `share`, one after another.
        single: the best single point within the same limits, as it was measured in turn with the cascade; None where
            no single point meets them.
    """

    small: Trial
    large: Trial
    rule: Rule
    expected_share: float
    expected_accuracy: float
    expected_latency_ms: float
    share: float
    score: Score
    measurement: Measurement
    single: Single | None

    @property
    def name(self) -> str:
        """The members and the rule in a few words."""
        return cascade_name(self.small, self.large, self.rule)


def cascade_name(small: Trial, large: Trial, rule: Rule) -> str:
    """`trial 3, then trial 7 where the margin is below 1.25`."""
    return f"trial {small.number}, then trial {large.number} where the {rule.kind} is below {rule.threshold:.4g}"


def _named(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(spec.name for spec in specs)

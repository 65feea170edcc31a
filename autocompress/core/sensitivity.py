"""How much each choice of a search space changes a model's outputs, and about what it saves: one choice at a time.

Such figures say where to look. They are sums of parts, of a few items, of a model that was neither recovered nor
exported: a search proposes by them and never reports them as a score.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autocompress.core.errors import InputError
from autocompress.core.record import RARE

SCHEMA = 1
Unit = Literal["kl divergence", "squared error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one choice does to the original model, all else left as it is.

    Attributes:
        loss: divergence of the outputs from the original's, in the unit of the `Sensitivity`; those of several choices
            are added up.
        cost: change of the share of fp32's latency, as far as multiply-adds tell it; negative is faster.
        probed: the model was run with it; False where the figures follow from other probes, between two of which it
            lies, or whose sum it is.
    """

    loss: float
    cost: float
    probed: bool = field(default=True, metadata=RARE)

    def __post_init__(self) -> None:
        if not self.loss >= 0:
            raise InputError(f"`loss` must be at least 0, got {self.loss}")
        if not self.cost >= -1:
            raise InputError(f"`cost` must be at least -1, all of the latency, got {self.cost}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The record of one round of probes.

    Attributes:
        effects: by variable of the search space (`core.space.Space.variables`), then by its choice as text. A layer's
            variable has its precisions only: "block" is what its block says.
        unit: of the losses: mean divergence of the class probabilities, in nats an item, or the outputs' squared error
            over their variance.
        int8_ratio: measured latency of uniform INT8 over fp32's, by which integer layers cost; None where it was not
            known and they cost by their bits.
        probes: how often the model was run in another form.
        seconds: all that took.
        items: calibration items that precisions were probed on; cuts were on 64 of them at most.
        left_out: why, by variable, or by `variable=choice` where others of its choices have an effect.
    """

    task: str
    target: str
    effects: Mapping[str, Mapping[str, Effect]]
    unit: Unit
    probes: int
    seconds: float
    items: int
    int8_ratio: float | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def ranked(self) -> tuple[str, ...]:
        """The variables that have an effect, the one with the largest loss of any of its choices first."""
        worst = {name: max((e.loss for e in found.values()), default=0.0) for name, found in self.effects.items()}
        return tuple(sorted(worst, key=lambda name: -worst[name]))

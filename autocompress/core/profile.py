"""A hardware profile: a device, its runtime, what is worth searching there, and how it is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from autocompress.core.artifact import Format
from autocompress.core.candidate import parse_precision
from autocompress.core.errors import InputError
from autocompress.core.measurement import MeasurePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a YAML file in hardware_profiles/ says.

    Attributes:
        runtime: name in the runtime table, or `module:Class` for a runtime of one's own.
        format: format of the artifacts this runtime loads.
        options: options of the runtime, passed to it as they stand.
        precisions: for each layer kind, the precisions worth searching on this device.
        width_multiple: channel widths are searched in multiples of this (kernels run in such steps).
        measure: the measuring plan.
    """

    name: str
    description: str
    runtime: str
    format: Format
    precisions: Mapping[str, tuple[str, ...]]
    width_multiple: int
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    measure: MeasurePlan = field(default_factory=MeasurePlan)

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.width_multiple < 1:
            raise InputError(f"`width_multiple` must be at least 1, got {self.width_multiple}")
        for names in self.precisions.values():
            for name in names:
                parse_precision(name)

    def allows(self, kind: str, precision: str) -> bool:
        """Whether `precision` is worth searching for layers of `kind` here; float always is."""
        return precision == "fp32" or precision in self.precisions.get(kind, ())

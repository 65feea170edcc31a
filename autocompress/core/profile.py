"""A hardware profile: a device, its runtime, what is worth searching there, and how it is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from autocompress.core.artifact import Format
from autocompress.core.candidate import FloatPrecision, parse_precision
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
        float_precisions: arithmetic for what is not integer, the device's default first.
        dialect: form of the quantized operators: "uint8" is uint8 asymmetric activations, "int8" int8 symmetric
            ones with rectifiers kept and float biases, "fp8" the same in eight-bit floats.
        sparse_kernels: whether the device has kernels that skip the zeros of the pattern 2:4.
        host: where the device is, as `--on` takes it.
        integer_weight_bits: most bits of the weights in layers that run on integers. 7 on x86 without VNNI, where
            the kernels add pairs of uint8 × int8 products in 16 bits and larger weights overflow.
        measure: the measuring plan.
    """

    name: str
    description: str
    runtime: str
    format: Format
    precisions: Mapping[str, tuple[str, ...]]
    width_multiple: int
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    float_precisions: tuple[FloatPrecision, ...] = ("fp32",)
    dialect: Literal["uint8", "int8", "fp8"] = "uint8"
    sparse_kernels: bool = False
    host: str = "local"
    integer_weight_bits: int = 8
    measure: MeasurePlan = field(default_factory=MeasurePlan)

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.width_multiple < 1:
            raise InputError(f"`width_multiple` must be at least 1, got {self.width_multiple}")
        if not 2 <= self.integer_weight_bits <= 8:
            raise InputError(f"`integer_weight_bits` must be in 2..8, got {self.integer_weight_bits}")
        if not self.float_precisions:
            raise InputError("`float_precisions` must name at least one of fp32, bf16, fp16")
        for names in self.precisions.values():
            for name in names:
                parse_precision(name)

    def executable(self, precision: str) -> str:
        """The precision, or the nearest one below whose integer weights do not overflow here."""
        choice = parse_precision(precision)
        even = choice.levels == "uniform"  # the values of a codebook become integers that fit, however many they are
        if even and choice.kernel == "int8" and choice.weight_bits > self.integer_weight_bits:
            return f"w{self.integer_weight_bits}a{choice.activation_bits}"
        return precision

    def allows(self, kind: str, precision: str) -> bool:
        """Whether `precision` is worth searching for layers of `kind` here; float always is."""
        return precision == "fp32" or precision in self.precisions.get(kind, ())

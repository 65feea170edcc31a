"""A candidate: everything that is chosen for one compressed model, and nothing that is measured."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autocompress.core.errors import InputError
from autocompress.core.record import to_json

Calibrator = Literal["minmax", "percentile", "mse"]
FloatPrecision = Literal["fp32", "bf16", "fp16"]
Pattern = Literal["unstructured", "2:4"]
SparsityName = float | Literal["2:4"]
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
ACTIVATION_BITS = (8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Zeros among a layer's weights.

    Attributes:
        ratio: share of the weights that is zero.
        pattern: "unstructured", the smallest of the layer, or "2:4", the two smallest of every four neighbouring input
            channels, which NVIDIA's sparse tensor cores skip (Mishra et al., 2021).
    """

    ratio: float
    pattern: Pattern = "unstructured"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"`sparsity` must be in (0, 1), got {self.ratio}")
        if self.pattern == "2:4" and self.ratio != 0.5:
            raise InputError(f"`sparsity` of pattern 2:4 is 0.5, got {self.ratio}")

    @property
    def name(self) -> SparsityName:
        """As a search space lists it: the share, or the pattern."""
        return self.pattern if self.pattern == "2:4" else self.ratio


def parse_sparsity(name: float | str) -> Sparsity | None:
    """The sparsity of that name, None for no zeros.

    Raises:
        InputError: it is neither "2:4" nor a share in [0, 1).
    """
    if name == "2:4":
        return Sparsity(ratio=0.5, pattern="2:4")
    if isinstance(name, str) or not 0 <= name < 1:
        raise InputError(f"`sparsities` must be '2:4' or in [0, 1), got {name!r}")
    return Sparsity(ratio=name) if name > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What happens to one layer. 32 bits is float; 16-bit weights are float16 in the file, float32 when run.

    Attributes:
        dynamic: the runtime quantizes the activations itself, each time anew, with the range it sees.
    """

    weight_bits: int = 32
    activation_bits: int = 32
    dynamic: bool = False
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS:
            raise InputError(f"`weight_bits` must be one of {WEIGHT_BITS}, got {self.weight_bits}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise InputError(f"`activation_bits` must be one of {ACTIVATION_BITS}, got {self.activation_bits}")
        if self.activation_bits < 32 and self.weight_bits > 8:
            raise InputError(
                f"{self.precision}: quantized activations need quantized weights, `weight_bits` must be at most 8"
            )
        if self.dynamic and self.activation_bits != 8:
            raise InputError(f"{self.precision}: `dynamic` is about quantized activations, they have 8 bits")

    @property
    def precision(self) -> str:
        """Short name: `fp32`, `w8a8`, `w4a32`, or `w8d8` where activations are quantized at run time."""
        if self.weight_bits == self.activation_bits == 32:
            return "fp32"
        return f"w{self.weight_bits}{'d' if self.dynamic else 'a'}{self.activation_bits}"

    @property
    def kernel(self) -> Literal["int8", "dynamic", "float"]:
        """Class of arithmetic the runtime uses: integer where activations are quantized."""
        if self.activation_bits == 32:
            return "float"
        return "dynamic" if self.dynamic else "int8"


def parse_precision(text: str) -> LayerChoice:
    """`fp32`, `w<weight bits>a<activation bits>`, or with `d` for activations quantized at run time."""
    if text == "fp32":
        return LayerChoice()
    match = re.fullmatch(r"w(\d+)([ad])(\d+)", text)
    if match is None:
        raise InputError(f"a precision is 'fp32' or like 'w8a8' (weight and activation bits) or 'w8d8', got {text!r}")
    return LayerChoice(weight_bits=int(match[1]), activation_bits=int(match[3]), dynamic=match[2] == "d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a candidate is calibrated and recovered."""

    calibrator: Calibrator = "minmax"
    recover_steps: int = 0

    def __post_init__(self) -> None:
        if self.recover_steps < 0:
            raise InputError(f"`recover_steps` must be at least 0, got {self.recover_steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One point of the joint space, in canonical form: only what differs from the original model is listed.

    Attributes:
        student: width of the user's own student, None for the original topology.
        widths: channels kept, by coupled group (named after its first layer).
        layers: choices by layer name; a layer not listed stays float and dense.
        float_precision: arithmetic of everything that is not integer.
        recipe: calibration and recovery.
    """

    student: float | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, LayerChoice] = field(default_factory=dict)
    float_precision: FloatPrecision = "fp32"
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        if self.student is not None and not self.student > 0:
            raise InputError(f"`student` must be a positive width, got {self.student}")
        for group, width in self.widths.items():
            if width < 1:
                raise InputError(f"the width of {group!r} must be at least 1, got {width}")
        plain = LayerChoice()
        object.__setattr__(self, "widths", dict(sorted(self.widths.items())))
        object.__setattr__(self, "layers", {k: v for k, v in sorted(self.layers.items()) if v != plain})

    @property
    def canonical(self) -> str:
        """JSON with sorted keys and no spaces: equal candidates have equal text."""
        return json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def weights_key(self) -> str:
        """Digest of what decides the float weights before quantization: student, widths, sparsity, recovery."""
        sparse = {name: choice.sparsity.name for name, choice in self.layers.items() if choice.sparsity}
        text = json.dumps([self.student, dict(self.widths), sparse, self.recipe.recover_steps])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def kernel_key(self) -> str:
        """Digest of what decides latency: topology, widths, and the class of kernel of each layer.

        Weight values, bits below the class and unstructured zeros do not change a kernel: files that share this key
        share a latency on one device.
        """
        kernels = {
            name: f"{choice.kernel} 2:4" if choice.sparsity and choice.sparsity.pattern == "2:4" else choice.kernel
            for name, choice in self.layers.items()
        }
        return self._key({name: kernel for name, kernel in kernels.items() if kernel != "float"})

    @property
    def precision_key(self) -> str:
        """As kernel_key, for runtimes in which the bits decide too."""
        kernels = {
            name: f"{choice.precision} 2:4"
            if choice.sparsity and choice.sparsity.pattern == "2:4"
            else choice.precision
            for name, choice in self.layers.items()
        }
        return self._key({name: kernel for name, kernel in kernels.items() if kernel != "fp32"})

    def _key(self, kernels: Mapping[str, str]) -> str:
        text = json.dumps([self.student, dict(self.widths), kernels, self.float_precision])
        return hashlib.sha256(text.encode()).hexdigest()

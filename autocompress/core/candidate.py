"""A candidate: everything that is chosen for one compressed model, and nothing that is measured."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from autocompress.core.errors import InputError
from autocompress.core.recipe import Recipe
from autocompress.core.record import RARE, to_json

FloatPrecision = Literal["fp32", "bf16", "fp16"]
NofM = Literal["2:4", "1:4", "4:8"]
Pattern = Literal["unstructured", "block"] | NofM
PATTERNS: tuple[NofM, ...] = ("2:4", "1:4", "4:8")
SparsityName = float | str
Levels = Literal["uniform", "kmeans", "power", "additive"]
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8, 32)
BLOCK = 4  # rows and columns of a block of zeros
_LEVELS: Mapping[str, Levels] = {"w": "uniform", "k": "kmeans", "p": "power", "s": "additive"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Zeros among a layer's weights.

    Attributes:
        ratio: share of the weights that is zero.
        pattern: "unstructured", the least important of the layer; "N:M", all but the N most important of every M
            neighbouring input channels (2:4 is what NVIDIA's sparse tensor cores skip, Mishra et al., 2021); or
            "block", whole blocks of 4 output channels × 4 input channels.
    """

    ratio: float
    pattern: Pattern = "unstructured"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"`sparsity` must be in (0, 1), got {self.ratio}")
        if (kept := self.kept) is not None and self.ratio != 1 - kept[0] / kept[1]:
            raise InputError(f"`sparsity` of pattern {self.pattern} is {1 - kept[0] / kept[1]}, got {self.ratio}")

    @property
    def kept(self) -> tuple[int, int] | None:
        """N and M of the pattern N:M, None for another."""
        n, colon, m = self.pattern.partition(":")
        return (int(n), int(m)) if colon else None

    @property
    def name(self) -> SparsityName:
        """As a search space lists it: the share, the pattern, or `block` and the share."""
        if self.pattern == "block":
            return f"block {self.ratio:g}"
        return self.ratio if self.pattern == "unstructured" else self.pattern


def parse_sparsity(name: float | str) -> Sparsity | None:
    """The sparsity of that name, None for no zeros.

    Raises:
        InputError: it is neither a pattern nor a share in [0, 1), nor "block" and a share.
    """
    for pattern in PATTERNS:
        if name == pattern:
            return Sparsity(ratio=0.75 if pattern == "1:4" else 0.5, pattern=pattern)
    if isinstance(name, str):
        if (match := re.fullmatch(r"block (0?\.\d+)", name)) is not None:
            return Sparsity(ratio=float(match[1]), pattern="block")
        raise InputError(f"`sparsities` must be 2:4, 1:4, 4:8, like 'block 0.5', or in [0, 1), got {name!r}")
    if not 0 <= name < 1:
        raise InputError(f"`sparsities` must be 2:4, 1:4, 4:8, like 'block 0.5', or in [0, 1), got {name!r}")
    return Sparsity(ratio=name) if name > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What happens to one layer. 32 bits is float; 16-bit weights are float16 in the file, float32 when run.

    Attributes:
        activation_bits: below 8 the integers are still bytes, of which only 2 to that many values are used.
        dynamic: the runtime quantizes the activations itself, each time anew, with the range it sees.
        levels: the values of weights of at most 8 bits: evenly spaced, with a scale for each channel; 2 to so many of
            a codebook that k-means finds for the layer (Han et al., 2016); powers of two; or sums of two of them
            (additive, Li et al., 2020).
        rank: the weight is a product of two of at most that inner dimension; a layer whose full rank is no more stays
            whole.
        factors: how a convolution is split: "channel", k×k to `rank` channels and then 1×1; or "spatial", k×1 and
            then 1×k.
    """

    weight_bits: int = 32
    activation_bits: int = 32
    dynamic: bool = False
    levels: Levels = field(default="uniform", metadata=RARE)
    sparsity: Sparsity | None = None
    rank: int | None = field(default=None, metadata=RARE)
    factors: Literal["channel", "spatial"] = field(default="channel", metadata=RARE)

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS:
            raise InputError(f"`weight_bits` must be one of {WEIGHT_BITS}, got {self.weight_bits}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise InputError(f"`activation_bits` must be one of {ACTIVATION_BITS}, got {self.activation_bits}")
        if self.activation_bits < 32 and self.weight_bits > 8:
            raise InputError(
                f"{self.precision}: quantized activations need quantized weights, `weight_bits` must be at most 8"
            )
        if self.levels != "uniform" and (self.weight_bits > 8 or self.dynamic):
            raise InputError(f"{self.precision}: {self.levels} levels are for weights of at most 8 bits, not dynamic")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"`rank` must be at least 1, got {self.rank}")
        if self.dynamic and self.activation_bits != 8:
            raise InputError(f"{self.precision}: `dynamic` is about quantized activations, they have 8 bits")

    @property
    def precision(self) -> str:
        """Short name: `fp32`, `w8a8`, `w4a32`, or `w8d8` where activations are quantized at run time.

        The first letter tells the levels: w uniform, k k-means, p powers of two, s sums of two powers.
        """
        if self.weight_bits == self.activation_bits == 32:
            return "fp32"
        letter = next(letter for letter, levels in _LEVELS.items() if levels == self.levels)
        return f"{letter}{self.weight_bits}{'d' if self.dynamic else 'a'}{self.activation_bits}"

    @property
    def clusters(self) -> int | None:
        """Values in the codebook, None without one."""
        return None if self.levels == "uniform" else 2**self.weight_bits

    @property
    def kernel(self) -> Literal["int8", "dynamic", "float"]:
        """Class of arithmetic the runtime uses: integer where activations are quantized."""
        if self.activation_bits == 32:
            return "float"
        return "dynamic" if self.dynamic else "int8"


def parse_precision(text: str) -> LayerChoice:
    """`fp32` or like `w8a8`; `d` for activations quantized at run time; `k`, `p`, `s` for other levels of weights."""
    if text == "fp32":
        return LayerChoice()
    match = re.fullmatch(r"([wkps])(\d+)([ad])(\d+)", text)
    if match is None:
        raise InputError(
            f"a precision is 'fp32' or like 'w8a8' (weight and activation bits), 'w8d8' or 'k4a32', got {text!r}"
        )
    return LayerChoice(
        weight_bits=int(match[2]), activation_bits=int(match[4]), dynamic=match[3] == "d", levels=_LEVELS[match[1]]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One point of the joint space, in canonical form: only what differs from the original model is listed.

    Attributes:
        student: width of the user's own student, None for the original topology.
        widths: channels kept, by coupled group (named after its first layer).
        heads: attention heads kept, by the module that has them.
        skipped: residual blocks left out, by name.
        layers: choices by layer name; a layer not listed stays float and dense.
        float_precision: arithmetic of everything that is not integer.
        recipe: calibration and recovery.
    """

    student: float | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict, metadata=RARE)
    skipped: tuple[str, ...] = field(default=(), metadata=RARE)
    layers: Mapping[str, LayerChoice] = field(default_factory=dict)
    float_precision: FloatPrecision = "fp32"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.student is not None and not self.student > 0:
            raise InputError(f"`student` must be a positive width, got {self.student}")
        for what, counts in (("width", self.widths), ("number of heads", self.heads)):
            for name, count in counts.items():
                if count < 1:
                    raise InputError(f"the {what} of {name!r} must be at least 1, got {count}")
        plain = LayerChoice()
        object.__setattr__(self, "widths", dict(sorted(self.widths.items())))
        object.__setattr__(self, "heads", dict(sorted(self.heads.items())))
        object.__setattr__(self, "skipped", tuple(sorted(set(self.skipped))))
        object.__setattr__(self, "layers", {k: v for k, v in sorted(self.layers.items()) if v != plain})

    @property
    def has_bits(self) -> bool:
        """Whether a layer is not float."""
        return any(choice.precision != "fp32" for choice in self.layers.values())

    def without_bits(self) -> "Candidate":
        """The same shapes and zeros, all in float."""
        layers = {n: LayerChoice(sparsity=c.sparsity, rank=c.rank, factors=c.factors) for n, c in self.layers.items()}
        return replace(self, layers=layers)

    @property
    def canonical(self) -> str:
        """JSON with sorted keys and no spaces: equal candidates have equal text."""
        return json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def shape_key(self) -> str:
        """Text of what decides the sizes of all tensors: equal ones differ in values only."""
        ranks = {name: (choice.rank, choice.factors) for name, choice in self.layers.items() if choice.rank}
        return json.dumps([self.student, dict(self.widths), dict(self.heads), self.skipped, ranks])

    @property
    def weights_key(self) -> str:
        """Digest of what decides the float weights: shapes, zeros, recovery, and bits if the recipe looks at them."""
        sparse = {name: choice.sparsity.name for name, choice in self.layers.items() if choice.sparsity}
        bits = {name: choice.precision for name, choice in self.layers.items()} if self.recipe.quantizes else {}
        how = [self.recipe.recover_steps, to_json(self.recipe.stages), self.recipe.calibrator if bits else ""]
        text = json.dumps([self.shape_key, sparse, bits, how])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def kernel_key(self) -> str:
        """Digest of what decides latency: shapes, and the class of kernel of each layer.

        Weight values, bits below the class and unstructured zeros do not change a kernel: files that share this key
        share a latency on one device.
        """
        return self._key({name: choice.kernel for name, choice in self.layers.items()}, "float")

    @property
    def precision_key(self) -> str:
        """As kernel_key, for runtimes in which the bits decide too."""
        return self._key({name: choice.precision for name, choice in self.layers.items()}, "fp32")

    def _key(self, kernels: Mapping[str, str], plain: str) -> str:
        patterned = {n for n, c in self.layers.items() if c.sparsity and c.sparsity.pattern == "2:4"}
        told = {n: f"{k} 2:4" if n in patterned else k for n, k in kernels.items() if k != plain or n in patterned}
        text = json.dumps([self.shape_key, told, self.float_precision])
        return hashlib.sha256(text.encode()).hexdigest()

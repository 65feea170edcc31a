"""Quantization-aware training: the layers of a model round while it is trained, and the scales are learned with it."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.compress.absorb import absorb
from autocompress.compress.cluster import codebook
from autocompress.compress.material import Material
from autocompress.compress.quantize import ActivationStats, Learned, activation_scale, quantize_weight
from autocompress.compress.straight import Book, Even, Range
from autocompress.core.candidate import LayerChoice
from autocompress.core.recipe import Calibrator

ITEMS = 128  # that ranges begin with
BATCH = 32
_STRIDE = 61  # prime, so that a sample does not walk in step with rows or channels
_SAMPLES = 1 << 16
_WEIGHT, _INPUT = "rounded_weight", "rounded_input"


class Aware:
    """A model in training for its bits: until `finish`, its layers round what they read and what they multiply with.

    Scales and ranges are parameters of the model and train with it, whatever trains it. Evaluating the model meanwhile
    simulates the file that it will be. BatchNorm is absorbed first, where it can be, as the file has it; its statistics
    and factors stay, its biases train.

    Attributes:
        model: what was given, changed in place.
        left_alone: layers that do not round, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerChoice],
        material: Material,
        learned: Learned = Learned(),  # noqa: B008 (frozen)
        *,
        dialect: Literal["uint8", "int8"] = "uint8",
        calibrator: Calibrator = "minmax",
    ) -> None:
        """Prepare `layers`, each of weights of at most 8 bits.

        Args:
            learned: scales and ranges to begin with; others are found, on the calibration items.
            dialect: form of activations: asymmetric, or symmetric.
            calibrator: of the ranges.

        Raises:
            StageError: an activation is not finite on the calibration items.
        """
        self.model = model
        modules = {name: model.get_submodule(name) for name in layers}
        self.left_alone = {n: f"a {type(m).__name__} does not round" for n, m in modules.items() if not _can_round(m)}
        self._layers = {name: module for name, module in modules.items() if name not in self.left_alone}
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        model.eval()
        sample = next(iter(material.calibration(2, 2)))[0]
        absorb(model, lambda model: material.call(model, sample))
        integer = [name for name in self._layers if layers[name].kernel == "int8"]
        seen = _observe(model, integer, material)
        ranges: dict[tuple[str, int], Range] = {}
        for name, module in self._layers.items():
            choice = layers[name]
            module.add_module(_WEIGHT, _grid(module, choice, learned.scales.get(name)))
            if name in seen:
                first, stats = seen[name]
                if (first, choice.activation_bits) not in ranges:
                    low, high = learned.inputs.get(name) or _bounds(stats, calibrator, name, choice.activation_bits)
                    found = Range(low, high, choice.activation_bits, symmetric=dialect == "int8")
                    ranges[first, choice.activation_bits] = found
                module.add_module(_INPUT, ranges[first, choice.activation_bits])
            _replace_forward(module, _rounding_forward)
        for norm in self._norms:
            _replace_forward(norm, _frozen_forward)

    @torch.no_grad()
    def finish(self) -> Learned:
        """Put the weights on their values, take what was added out of the model again, and tell what was learned."""
        scales, inputs = {}, {}
        self.model.eval()
        for name, module in self._layers.items():
            grid, weight = module.get_submodule(_WEIGHT), module.get_parameter("weight")
            weight.copy_(grid(weight))
            if isinstance(grid, Even):
                scales[name] = grid.scale.cpu().numpy()
            delattr(module, _WEIGHT)
            if isinstance(found := getattr(module, _INPUT, None), Range):
                low, high = found.bounds.tolist()
                inputs[name] = (low, high)
                delattr(module, _INPUT)
        for module in (*self._layers.values(), *self._norms):
            del module.forward
        return Learned(scales=scales, inputs=inputs)


def _can_round(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding)


def _replace_forward(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Until the attribute is deleted. A method of the module, not a closure: a deep copy of the model has its own."""
    vars(module)["forward"] = MethodType(forward, module)


def _frozen_forward(self: Any, input: Tensor) -> Tensor:
    """BatchNorm's, with the statistics and factors it has."""
    factor = None if self.weight is None else self.weight.detach()
    return F.batch_norm(input, self.running_mean, self.running_var, factor, self.bias, eps=self.eps)


def _rounding_forward(self: Any, input: Tensor) -> Tensor:
    """A layer's own forward, on a rounded input and with a rounded weight."""
    weight: Tensor = self.rounded_weight(self.weight)
    x = self.rounded_input(input) if hasattr(self, _INPUT) else input
    if isinstance(self, nn.Linear):
        return F.linear(x, weight, self.bias)
    if isinstance(self, nn.Embedding):
        return F.embedding(x, weight, self.padding_idx)
    convolved: Tensor = self._conv_forward(x, weight, self.bias)
    return convolved


def _grid(module: nn.Module, choice: LayerChoice, scale: NDArray[np.float32] | None) -> Even | Book:
    weight = module.get_parameter("weight").detach().cpu().numpy()
    if choice.levels != "uniform":
        table = codebook(weight, choice.weight_bits, choice.levels)[1]
        return Book(table, moves=choice.levels == "kmeans", integer=choice.kernel == "int8")
    return Even(quantize_weight(weight, choice.weight_bits, 0)[1] if scale is None else scale, choice.weight_bits)


def _bounds(stats: ActivationStats, calibrator: Calibrator, name: str, bits: int) -> tuple[float, float]:
    found = activation_scale(stats, calibrator, name, bits)
    return -found.zero_point * found.scale, (2**bits - 1 - found.zero_point) * found.scale


def _observe(model: nn.Module, names: list[str], material: Material) -> dict[str, tuple[str, ActivationStats]]:
    """For each layer that reads floats: the first layer that reads the same tensor, and what that tensor holds."""
    modules = {model.get_submodule(name): name for name in names}
    readers: dict[str, str] = {}
    firsts: dict[tuple[int, int], str] = {}
    held: list[Tensor] = []  # an identity is one as long as the tensor lives
    found: dict[str, list[NDArray[np.float32]]] = {}
    ends: dict[str, list[tuple[float, float]]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        name, x = modules[module], args[0] if args else named["input"]
        if name not in readers and x.is_floating_point():
            held.append(x)
            readers[name] = firsts.setdefault((id(x), x._version), name)
        if readers.get(name) == name:
            ends.setdefault(name, []).append((float(x.min()), float(x.max())))
            found.setdefault(name, []).append(x.float().flatten()[::_STRIDE].cpu().numpy())

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            for batch, _ in material.calibration(ITEMS, BATCH):
                material.call(model, batch)
                held.clear()
                firsts.clear()
    finally:
        for handle in handles:
            handle.remove()
    stats = {name: _stats(np.array(ends[name]), np.concatenate(found[name])) for name in found}
    return {name: (first, stats[first]) for name, first in readers.items()}


def _stats(ends: NDArray[np.float64], sample: NDArray[np.float32]) -> ActivationStats:
    few = sample[:: max(1, len(sample) // _SAMPLES)]
    return ActivationStats(low=float(ends[:, 0].min()), high=float(ends[:, 1].max()), sample=few)

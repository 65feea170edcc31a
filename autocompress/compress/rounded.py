"""A model in which single layers round for a moment, as a file with these bits would."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.compress.absorb import absorb
from autocompress.compress.cluster import codebook, nearest
from autocompress.compress.material import Batch, Call
from autocompress.compress.quantize import ActivationStats, activation_scale, quantize_weight
from autocompress.core.candidate import LayerChoice
from autocompress.core.errors import StageError

_NONE = np.zeros(0, np.float32)


class Rounded:
    """One copy of a model for all probes, its BatchNorm absorbed where it can be, as the file has it.

    Attributes:
        model: the copy, which rounds inside `at` only.
    """

    def __init__(
        self,
        original: nn.Module,
        layers: Sequence[str],
        call: Call,
        batches: Sequence[Batch],
        dialect: Literal["uint8", "int8"],
    ) -> None:
        """Look once at what each of `layers` reads.

        Args:
            dialect: form of integer activations: asymmetric, or symmetric.
        """
        self.model = copy.deepcopy(original).eval().requires_grad_(False)
        few = {name: tensor[:2] for name, tensor in batches[0].items()}
        absorb(self.model, lambda model: call(model, few))
        self._symmetric = dialect == "int8"
        self._ends: dict[str, tuple[float, float]] = {}
        handles = [
            self.model.get_submodule(n).register_forward_pre_hook(self._look(n), with_kwargs=True) for n in layers
        ]
        try:
            with torch.no_grad():
                for batch in batches:
                    call(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def at(self, choices: Mapping[str, LayerChoice]) -> Iterator[nn.Module]:
        """The model with these layers rounded, until the block is left.

        Raises:
            StageError: what a layer reads is not finite, or it did not run.
        """
        kept: list[tuple[nn.Parameter, Tensor]] = []
        handles = []
        try:
            for name, choice in choices.items():
                module = self.model.get_submodule(name)
                weight = module.get_parameter("weight")
                kept.append((weight, weight.data))
                weight.data = round_weight(weight.data, choice)
                if choice.activation_bits < 32:
                    hook = self._round_input(name, choice.activation_bits)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield self.model
        finally:
            for parameter, data in kept:
                parameter.data = data
            for handle in handles:
                handle.remove()

    def _look(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["input"]
            if x.is_floating_point():
                low, high = (float(end) for end in x.aminmax())
                before = self._ends.get(name, (0.0, 0.0))
                self._ends[name] = min(low, before[0]), max(high, before[1])

        return hook

    def _round_input(self, name: str, bits: int) -> Any:
        if name not in self._ends:
            raise StageError("calibrate", f"layer {name!r} read no floats on the calibration items")
        low, high = self._ends[name]
        if self._symmetric:
            top = 2 ** (bits - 1) - 1
            scale, zero, ends = max(-low, high, 1e-8) / top, 0, (-top, top)
        else:
            ends = (0, 2**bits - 1)
            found = activation_scale(ActivationStats(low=low, high=high, sample=_NONE), "minmax", name, bits)
            scale, zero = found.scale, found.zero_point
        if not np.isfinite(scale):
            raise StageError("calibrate", f"activation {name!r} ranges from {low} to {high} on the calibration data")

        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (torch.fake_quantize_per_tensor_affine(args[0], scale, zero, *ends), *args[1:]), named
            rounded = torch.fake_quantize_per_tensor_affine(named["input"], scale, zero, *ends)
            return args, {**named, "input": rounded}

        return hook


def round_weight(weight: Tensor, choice: LayerChoice) -> Tensor:
    """The nearest weights that a layer of that choice can have; a new tensor."""
    if choice.weight_bits == 32:
        return weight
    if choice.weight_bits == 16:
        return weight.half().to(weight.dtype)
    array = weight.detach().cpu().numpy()
    if choice.levels == "uniform":
        q, scale = quantize_weight(array, choice.weight_bits, 0)
        rounded = q * scale.reshape(-1, *(1,) * (array.ndim - 1))
    else:
        which, table = codebook(array, choice.weight_bits, choice.levels)
        if choice.kernel == "int8" and choice.levels == "kmeans":  # integers of 7 bits, which all kernels take
            step = max(float(np.abs(table).max()) / 63, 1e-8)
            table = np.rint(table / step) * step
            which = nearest(array, table)
        rounded = table[which]
    return torch.from_numpy(np.ascontiguousarray(rounded, np.float32)).to(weight.device)

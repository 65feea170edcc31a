"""Export to LiteRT: converted once for equal weights, each candidate one pass of the vendor's quantizer over that.

Operators are found by a fingerprint of their weights, because their names do not follow those of the modules: the
tensor a layer's operator gives is then named after the layer, which is how a recipe reaches it and how what ran is
read back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.compress.cut import present
from autocompress.compress.quantize import ActivationStats, Learned, activation_scale
from autocompress.core.artifact import Format, TensorSpec
from autocompress.core.candidate import Candidate, LayerChoice
from autocompress.core.errors import StageError, TaskError
from autocompress.core.extras import require
from autocompress.core.profile import Profile
from autocompress.core.recipe import Calibrator
from autocompress.export.exporter import Batch, Lowered, Source, Watch
from autocompress.export.flatbuffer import Flatbuffer
from autocompress.export.parity import FLOAT_TOLERANCE, float_difference
from autocompress.export.tflite_layers import find_layers, weights_of
from autocompress.export.tflite_quantize import (
    check_choices,
    check_types,
    joins,
    learned_spans,
    quantized,
    quiet,
    vendor_quantized,
    with_scales,
)

_STRIDE = 61
_SAMPLES = 1 << 16
_UNMAPPED = "its weight is not read by exactly one operator of the converted model"


class TfliteExporter:
    """Converts with litert-torch. Inputs keep the task's layout, the batch is one."""

    format: Format = "tflite"
    suffix = ".tflite"

    def __init__(self, model: nn.Module, layers: list[str], source: Source, profile: Profile) -> None:  # noqa: ARG002
        """See `exporter.MakesExporter`."""
        self._layers = layers
        self._source = source
        try:
            data = _convert(model, source)
        except StageError as error:
            raise TaskError(str(error)) from error
        data, found = _named(data, model, layers, source)
        self.unmapped: Mapping[str, str] = {name: _UNMAPPED for name in layers if name not in found}
        self.difference = _difference(data, model, source)
        if self.difference > FLOAT_TOLERANCE:
            raise TaskError(_differs(self.difference))

    def convert(
        self,
        model: nn.Module,
        topology: str,  # noqa: ARG002 (all is traced anew)
        watch: Watch,
        learned: Learned,
    ) -> "TfliteFloat":
        """The model as a float flatbuffer."""
        with watch("export"):
            names = present(model, self._layers)
            data, found = _named(_convert(model, self._source), model, list(names), self._source)
        with watch("check"):
            difference = _difference(data, model, self._source)
        if difference > FLOAT_TOLERANCE:
            raise StageError("export", _differs(difference))
        lost = (weights_of(model).keys() & names.keys()) - found.keys() - self.unmapped.keys()
        return TfliteFloat(data, found, names, lost, self._source, learned)


class TfliteFloat:
    """A float flatbuffer, and what calibration saw of it."""

    def __init__(
        self,
        data: bytes,
        layers: Mapping[str, str],
        names: Mapping[str, str],
        lost: set[str],
        source: Source,
        learned: Learned,
    ) -> None:
        """`layers` are those found in the file, with the kind of their operator; `lost` are no longer found in it.

        `names`: layers of the original by the names they have in the model.
        """
        self._data = data
        self._layers = layers
        self._names = names
        self._lost = lost
        self._source = source
        self._learned = learned
        self._stats: dict[str, ActivationStats] | None = None
        self._read = Flatbuffer(data)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""
        fed = self._read.fed()
        return tuple(self._spec(name, fed[name]) for name in self._source.sample)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""
        given = self._read.given()
        return tuple(self._spec(name, given[name]) for name in self._source.outputs)

    def lower(self, candidate: Candidate, watch: Watch) -> Lowered:
        """The file quantized as the candidate says, its types read back."""
        chosen = {own: candidate.layers[name] for own, name in self._names.items() if name in candidate.layers}
        layers = {name: choice for name, choice in chosen.items() if name in self._layers}
        static = {name for name, choice in layers.items() if choice.kernel == "int8"}
        for name in self._lost & {n for n, choice in chosen.items() if choice.precision != "fp32"}:
            raise StageError("export", f"layer {name!r} of the compressed model: {_UNMAPPED}")
        if not any(choice.precision != "fp32" for choice in layers.values()):
            return Lowered(data=self._data)
        check_choices(layers)
        if static and self._stats is None:
            with watch("calibrate"):
                self._stats = collect_stats(self._data, self._source)
        with watch("export"):
            ranges = self._ranges(static, candidate.recipe.calibrator) if static else None
            data = quantized(self._data, self._recipe(layers, static), ranges)
            data = with_scales(data, self._read, layers, self._learned.scales)
            check_types(data, layers)
        return Lowered(data=data)

    def vendor_int8(self, watch: Watch) -> Lowered:
        """litert-quantizer's own recipe with its own calibration, over all operators it can quantize."""
        with watch("export"):
            items = [_feeds(batch, self._read) for batch in self._source.calibration(1)]
            return Lowered(data=vendor_quantized(self._data, items))

    def _ranges(self, static: set[str], calibrator: Calibrator) -> dict[str, Any]:
        """What the quantizer takes for the tensors' ranges: learned ones, else those that calibration saw."""
        found = {name: _calibrated(name, stats, calibrator) for name, stats in (self._stats or {}).items()}
        found |= learned_spans(self._read, static, self._learned.inputs)
        return {
            name: {"min": np.array([low], np.float32), "max": np.array([high], np.float32)}
            for name, (low, high) in found.items()
        }

    def _recipe(self, layers: Mapping[str, LayerChoice], static: set[str]) -> "list[tuple[str, str, LayerChoice]]":
        """Tensor name, kind of operator, and choice, for layers and for what joins integer ones."""
        found = [(name, self._layers[name], choice) for name, choice in layers.items() if choice.precision != "fp32"]
        int8 = LayerChoice(weight_bits=8, activation_bits=8)
        return found + [(self._read.name(op.outputs[0]), op.kind, int8) for op in joins(self._read, static)]

    def _spec(self, name: str, tensor: int) -> TensorSpec:
        return TensorSpec(name=name, dtype=self._read.dtype(tensor).lower(), shape=self._read.shape(tensor))


def collect_stats(data: bytes, source: Source) -> dict[str, ActivationStats]:
    """Statistics of every float tensor that is computed or fed, by name, over the calibration items."""
    graph = Flatbuffer(data)
    interpreter = _interpreter(data, keep=True)
    names = {d["index"]: d["name"] for d in interpreter.get_tensor_details() if d["dtype"] is np.float32}
    fed = {index for index, name in names.items() if index in graph.fed().values()}
    made = {index for op in graph.ops() for index in op.outputs}
    watched = [index for index in names if index in made | fed]
    seen: dict[int, list[NDArray[Any]]] = {index: [] for index in watched}
    low, high = dict.fromkeys(watched, np.inf), dict.fromkeys(watched, -np.inf)
    for batch in source.calibration(1):
        _invoke(interpreter, graph, _feeds(batch, graph))
        for index in watched:
            value = interpreter.get_tensor(index).reshape(-1)
            low[index] = min(low[index], float(value.min()))
            high[index] = max(high[index], float(value.max()))
            seen[index].append(value[:: min(_STRIDE, max(1, len(value) // 16))])
    return {
        graph.name(index): ActivationStats(low=low[index], high=high[index], sample=_thin(np.concatenate(seen[index])))
        for index in watched
    }


def _thin(sample: NDArray[Any]) -> NDArray[Any]:
    return sample[:: max(1, len(sample) // _SAMPLES)]


def _calibrated(name: str, stats: ActivationStats, calibrator: Calibrator) -> tuple[float, float]:
    """Lowest and highest value that the integers of a tensor stand for."""
    found = activation_scale(stats, calibrator, name)
    low = -found.zero_point * found.scale
    return low, low + 255 * found.scale


def _named(data: bytes, model: nn.Module, layers: Sequence[str], source: Source) -> tuple[bytes, dict[str, str]]:
    """The file with its layers' tensors, inputs and outputs named as the task does; layers found, with their kinds."""
    graph = Flatbuffer(data)
    found = find_layers(graph, model, layers)
    graph.rename({op.outputs[0]: name for name, op in found.items()})
    keys = graph.fed()
    if source.by_keyword:
        names = {key: key for key in keys}
    else:
        names = {f"args_{i}": name for i, name in enumerate(source.sample)}
    graph.signature(names, source.outputs)
    return graph.data(), {name: op.kind for name, op in found.items()}


def _convert(model: nn.Module, source: Source) -> bytes:
    """Raises StageError where the converter cannot."""
    item = {name: tensor[:1] for name, tensor in source.sample.items()}
    args, kwargs = ((), item) if source.by_keyword else (tuple(item.values()), {})
    with quiet():
        converter = require("litert_torch", "tflite")
        try:
            return bytes(converter.convert(model, args, kwargs).model_content())
        except Exception as error:  # a compiler's whole zoo
            first = next(iter(str(error).strip().splitlines()), "")
            text = f"litert-torch cannot convert the model: {type(error).__name__}: {first}"
            raise StageError("export", text) from error


def _difference(data: bytes, model: nn.Module, source: Source) -> float:
    """Largest difference to torch on an item, relative to the largest output."""
    item = {name: tensor[:1] for name, tensor in source.sample.items()}
    with torch.no_grad():
        wanted = source.run(model, item)
    graph = Flatbuffer(data)
    got = _invoke(_interpreter(data), graph, _feeds(item, graph))
    return float_difference([got[name] for name in wanted], [t.numpy() for t in wanted.values()])


def _interpreter(data: bytes, *, keep: bool = False) -> Any:
    with quiet():
        module = require("ai_edge_litert.interpreter", "tflite")
        made = module.Interpreter(model_content=data, num_threads=1, experimental_preserve_all_tensors=keep)
        made.allocate_tensors()
    return made


def _invoke(interpreter: Any, graph: Flatbuffer, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    for name, index in graph.fed().items():
        interpreter.set_tensor(index, feeds[name])
    interpreter.invoke()
    return {name: interpreter.get_tensor(index).copy() for name, index in graph.given().items()}


def _feeds(batch: Batch, graph: Flatbuffer) -> dict[str, NDArray[Any]]:
    """A batch in the types of the file: the converter makes 32-bit integers of those of 64 bits."""
    types = {name: np.dtype(graph.dtype(index).lower()) for name, index in graph.fed().items()}
    return {name: tensor.numpy().astype(types[name], copy=False) for name, tensor in batch.items()}


def _differs(difference: float) -> str:
    return (
        f"the converted file does not compute what the torch model does: outputs differ by {difference:.2g} of their "
        f"largest value, at most {FLOAT_TOLERANCE:g} is accepted"
    )

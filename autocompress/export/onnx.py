"""Export to ONNX: one template for each topology, weights exchanged, Q/DQ inserted, checked in ONNX Runtime."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.compress.cut import present
from autocompress.compress.quantize import ActivationStats, Learned
from autocompress.core.artifact import Format, TensorSpec
from autocompress.core.candidate import Candidate, LayerChoice
from autocompress.core.errors import StageError, TaskError
from autocompress.core.profile import Profile
from autocompress.export.calibrate import collect_stats
from autocompress.export.exporter import Lowered, Source, Watch
from autocompress.export.graph import specs, to_bytes
from autocompress.export.parity import (
    FLOAT_TOLERANCE,
    check_optimised,
    check_simulated,
    float_difference,
    layer_sqnr,
    run_onnx,
)
from autocompress.export.qdq import lower
from autocompress.export.symmetric import lower_symmetric
from autocompress.export.template import Template, export_template
from autocompress.export.vendor import uniform_int8
from autocompress.export.weights import Kernels

BATCH = 32
CHECKED_ITEMS = 4
_KEPT = 16

Feeds = Mapping[str, NDArray[np.generic]]


class OnnxExporter:
    """Exports to ONNX. The template of a topology is traced once, or shared where only sizes differ."""

    format: Format = "onnx"
    suffix = ".onnx"

    def __init__(self, model: nn.Module, layers: list[str], source: Source, profile: Profile) -> None:
        """See `exporter.MakesExporter`."""
        self._source = source
        self._profile = profile
        self._layers = layers
        self._original = self._export(model)
        self._templates: OrderedDict[str, Template] = OrderedDict()
        self._checked: set[str] = set()
        self.unmapped: Mapping[str, str] = self._original.unmapped
        self.difference = self._difference(self._original, self._original.fill(model), model)
        if self.difference > FLOAT_TOLERANCE:
            raise TaskError(_differs(self.difference))

    def convert(self, model: nn.Module, topology: str, watch: Watch, learned: Learned) -> "OnnxFloat":
        """The model as a graph: of the original's template, or where sizes are baked into that, of its own."""
        if topology not in self._templates:
            for template in self._alike(model):
                with contextlib.suppress(StageError):  # a size baked into the graph: the cut weights do not fit, or the
                    return self._filled(template, model, watch, learned)  # outputs are others
        if topology not in self._templates:
            with watch("export"):
                self._templates[topology] = self._export(model)
            if len(self._templates) > _KEPT:
                self._templates.popitem(last=False)
        self._templates.move_to_end(topology)
        return self._filled(self._templates[topology], model, watch, learned)

    def _alike(self, model: nn.Module) -> list[Template]:
        """The template of the original, and the latest of its own for a model of the same parts, where they may fit."""
        names = _names(model)
        found = [self._original] if set(self._original.weights) <= names else []
        own = [template for template in self._templates.values() if template.names == names]
        return found + own[-1:]

    def _filled(self, template: Template, model: nn.Module, watch: Watch, learned: Learned) -> "OnnxFloat":
        with watch("export"):
            graph = template.fill(model)
        with watch("check"):
            difference = self._difference(template, graph, model)
        if difference > FLOAT_TOLERANCE:
            raise StageError("export", _differs(difference))
        names = present(model, self._layers)
        return OnnxFloat(template, graph, names, self._source, self._profile, self._checked, learned)

    def _export(self, model: nn.Module) -> Template:
        source = self._source
        layers = list(present(model, self._layers))
        return export_template(model, source.sample, layers, source.outputs, by_keyword=source.by_keyword)

    def _difference(self, template: Template, graph: ir.Model, model: nn.Module) -> float:
        """Largest difference of a float graph to torch on a sample, relative to the largest output."""
        sample = {n: t if template.dynamic_batch else t[:1] for n, t in self._source.sample.items()}
        with torch.no_grad():
            wanted = self._source.run(model, sample)
        got = run_onnx(to_bytes(graph), _feeds(sample))
        return float_difference(got, [t.numpy() for t in wanted.values()])


class OnnxFloat:
    """A float graph, and what calibration saw of it."""

    def __init__(
        self,
        template: Template,
        graph: ir.Model,
        names: Mapping[str, str],
        source: Source,
        profile: Profile,
        checked: set[str],
        learned: Learned,
    ) -> None:
        """`names`: layers of the original by the names they have in the model.

        `checked` holds the kernel keys whose optimised outputs were compared with unoptimised ones.
        """
        self._template = template
        self._graph = graph
        self._names = names
        self._source = source
        self._profile = profile
        self._checked = checked
        self._learned = learned
        self._stats: dict[str, ActivationStats] | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""
        return specs(list(self._graph.graph.inputs))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""
        return specs(list(self._graph.graph.outputs))

    def lower(self, candidate: Candidate, watch: Watch) -> Lowered:
        """A copy of the graph with the candidate's choices, as bytes."""
        layers = {
            own: candidate.layers[name]
            for own, name in self._names.items()
            if name in candidate.layers and own in self._template.nodes
        }
        for name, choice in layers.items():
            if choice.dynamic:
                raise StageError("export", f"layer {name!r}: {choice.precision} is made for LiteRT only")
        integer = any(choice.kernel == "int8" for choice in layers.values())
        if integer and self._stats is None:
            with watch("calibrate"):
                self._stats = collect_stats(self._graph, self._template.nodes, self._batches())
        with watch("export"):
            data = to_bytes(self._lowered(layers, candidate))
        if integer and self._profile.dialect == "uint8" and candidate.kernel_key not in self._checked:
            with watch("check"):
                items = CHECKED_ITEMS if self._template.dynamic_batch else 1
                feeds = _feeds(next(self._source.calibration(items)))
                check_optimised(data, feeds, list(layers), exact=lambda: run_onnx(to_bytes(self._graph), feeds))
                self._checked.add(candidate.kernel_key)
        if self._learned.simulated and self._profile.dialect == "uint8" and layers:
            with watch("check"):
                self._check_simulated(data, list(layers))
        return Lowered(data=data, options=_options(candidate, self._profile))

    def _check_simulated(self, data: bytes, layers: list[str]) -> None:
        """Raise StageError("parity") where the file gives something else than what training saw."""
        count = len(self._learned.simulated[0]) if self._template.dynamic_batch else 1
        feeds = _feeds(next(self._source.calibration(count)))
        got = [o for o in run_onnx(data, feeds) if np.issubdtype(o.dtype, np.floating)]
        check_simulated(
            [array[:count] for array in self._learned.simulated],
            got,
            lambda: layer_sqnr(to_bytes(self._graph), data, feeds, layers),
        )

    def _lowered(self, layers: Mapping[str, LayerChoice], candidate: Candidate) -> ir.Model:
        graph, stats, calibrator = self._graph.clone(), self._stats or {}, candidate.recipe.calibrator
        if self._profile.dialect == "uint8":
            kernels = Kernels(bits=self._profile.integer_weight_bits, sparse=self._profile.runtime != "openvino")
            return lower(graph, layers, stats, calibrator, self._learned, kernels=kernels)
        return lower_symmetric(
            graph,
            layers,
            stats,
            calibrator,
            dialect=self._profile.dialect,
            floats=candidate.float_precision,
            learned=self._learned,
        )

    def vendor_int8(self, watch: Watch) -> Lowered:
        """Uniform INT8 by the tool that the runtime's vendor gives for ONNX files."""
        with watch("export"):
            return Lowered(data=uniform_int8(to_bytes(self._graph), self._batches(), self._profile))

    def _batches(self) -> Iterator[Feeds]:
        return map(_feeds, self._source.calibration(BATCH if self._template.dynamic_batch else 1))


def _options(candidate: Candidate, profile: Profile) -> dict[str, Any]:
    """OpenVINO takes the precision of float arithmetic as an option; the other runtimes read it from the graph.

    TensorRT looks for kernels that skip zeros only where it is told to.
    """
    if profile.runtime == "tensorrt" and any(
        c.sparsity and c.sparsity.pattern == "2:4" for c in candidate.layers.values()
    ):
        return {"sparse_weights": True}
    if profile.runtime != "openvino":
        return {}
    return {"inference_precision": {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[candidate.float_precision]}


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()))


def _feeds(batch: Mapping[str, torch.Tensor]) -> Feeds:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def _differs(difference: float) -> str:
    return (
        f"the exported graph does not compute what the torch model does: outputs differ by {difference:.2g} of their "
        f"largest value, at most {FLOAT_TOLERANCE:g} is accepted"
    )

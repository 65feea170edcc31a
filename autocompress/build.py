"""A candidate becomes a file: compress, recover, export, check."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import AutocompressError, StageError, TaskError
from autocompress.core.space import Structure

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn

    from autocompress.compress.quantize import ActivationStats
    from autocompress.export.template import Template
    from autocompress.task import CheckedTask

SETTLE_ITEMS = 128  # BatchNorm statistics are estimated anew on so many items
CALIBRATION_ITEMS = 128
BATCH = 32
_KEPT = 4  # float models kept in memory: candidates that differ in bits only share one
_TEMPLATES_KEPT = 16


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage. What it raises becomes a StageError of that stage."""
        before = time.monotonic()
        try:
            yield
        except AutocompressError:
            raise
        except Exception as error:  # the one place where a candidate's failure, whatever it is, becomes a value
            first = next(iter(str(error).strip().splitlines()), "")
            raise StageError(stage, f"{type(error).__name__}: {first}") from error
        finally:
            self.seconds[stage] += time.monotonic() - before


@dataclass(slots=True, kw_only=True)
class _Float:
    """A compressed float model as a graph, and what calibration saw of it."""

    template: "Template"
    graph: "ir.Model"
    stats: "dict[str, ActivationStats] | None" = None


class Builder:
    """Makes artifacts of one task's model. The template of a topology is exported once.

    Attributes:
        structure: what can be compressed.
        float_difference: largest difference of the exported original to torch, relative to the largest output.
    """

    def __init__(self, task: "CheckedTask", folder: Path) -> None:
        from autocompress.compress.layers import describe

        self._task = task
        self._artifacts = folder / "artifacts"
        self._weights = folder / "weights"
        self._sample = task.batch("calibration", range(min(2, len(task.split("calibration")))))[0]
        found, self._groups = describe(task.model, lambda model: task.call(model, self._sample))
        template = self._export(task.model, [layer.name for layer in found.layers])
        self.structure = Structure(
            layers=tuple(layer for layer in found.layers if layer.name in template.nodes),
            groups=found.groups,
            left_alone={**found.left_alone, **template.unmapped},
        )
        self._templates: OrderedDict[str, Template] = OrderedDict({_topology(Candidate()): template})
        self._floats: OrderedDict[str, _Float] = OrderedDict()
        self._checked_kernels: set[str] = set()
        self.float_difference = self._difference(template, template.fill(task.model), task.model)
        self._check_original()

    def build(self, candidate: Candidate, watch: Stopwatch) -> Artifact:
        """The artifact of a candidate, a file in the run's artifacts folder.

        Raises:
            StageError: it cannot be made, or does not compute what the compressed model computes.
        """
        from autocompress.export.graph import to_bytes
        from autocompress.export.parity import check_optimised
        from autocompress.export.qdq import lower

        made = self._float(candidate, watch)
        layers = {name: choice for name, choice in candidate.layers.items() if name in made.template.nodes}
        integer = any(choice.kernel == "int8" for choice in layers.values())
        if integer and made.stats is None:
            with watch("calibrate"):
                made.stats = self._calibrate(made)
        with watch("export"):
            graph = made.graph.clone()
            spec = _specs(graph)
            data = to_bytes(lower(graph, layers, made.stats or {}, candidate.recipe.calibrator))
            if integer and candidate.kernel_key not in self._checked_kernels:
                check_optimised(data, self._feeds(made.template, 4))
                self._checked_kernels.add(candidate.kernel_key)
            return self._write(candidate.digest, data, *spec)

    def vendor_int8(self, watch: Stopwatch, *, reduce_range: bool) -> Artifact:
        """Uniform INT8 of the original by the runtime's own tool."""
        from autocompress.export.graph import to_bytes
        from autocompress.export.vendor import onnxruntime_uniform_int8

        with watch("export"):
            made = self._float(Candidate(), watch)
            spec = _specs(made.graph)
            data = onnxruntime_uniform_int8(
                to_bytes(made.graph), self._calibration_feeds(made.template), reduce_range=reduce_range
            )
            return self._write("uniform-int8", data, *spec)

    def _float(self, candidate: Candidate, watch: Stopwatch) -> _Float:
        key = candidate.weights_key
        if key not in self._floats:
            model = self._compress(candidate, watch)
            with watch("export"):
                template, graph = self._fitted(candidate, model)
                self._floats[key] = _Float(template=template, graph=graph)
            if len(self._floats) > _KEPT:
                self._floats.popitem(last=False)
        self._floats.move_to_end(key)
        return self._floats[key]

    def _compress(self, candidate: Candidate, watch: Stopwatch) -> "nn.Module":
        from safetensors.torch import load_file, save_file

        from autocompress.compress.apply import apply

        saved = self._weights / f"{candidate.weights_key}.safetensors"
        recipe = candidate.recipe
        known = recipe.recover_steps > 0 and saved.exists()
        if known:
            candidate = dataclasses.replace(candidate, recipe=dataclasses.replace(recipe, recover_steps=0))
        model = apply(
            candidate,
            self._task.model,
            self._groups,
            self._task.call,
            student=self._task.task.student,
            settle=(lambda: ()) if known else self._settle_batches,
            train=lambda: self._train_batches(candidate.weights_key),
            classifies=self._task.task.loss is None,
            stage=watch,
        )
        if known:
            model.load_state_dict(load_file(saved))
        elif recipe.recover_steps:
            self._weights.mkdir(exist_ok=True)
            temporary = saved.with_suffix(f".{os.getpid()}")
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
            temporary.replace(saved)
        return model

    def _fitted(self, candidate: Candidate, model: "nn.Module") -> "tuple[Template, ir.Model]":
        """The model as a graph: of the original's template, or where sizes are baked into that, of its own."""
        from autocompress.export.parity import FLOAT_TOLERANCE

        key, original = _topology(candidate), _topology(Candidate())
        if key not in self._templates and candidate.student is None:
            template = self._templates[original]
            with contextlib.suppress(StageError):  # a size baked into the graph: ONNX Runtime refuses the cut weights
                graph = template.fill(model)
                if self._difference(template, graph, model) <= FLOAT_TOLERANCE:
                    return template, graph
        if key not in self._templates:
            self._templates[key] = self._export(model, [layer.name for layer in self.structure.layers])
            if len(self._templates) > _TEMPLATES_KEPT:
                del self._templates[next(k for k in self._templates if k != original)]
        template = self._templates[key]
        graph = template.fill(model)
        if (difference := self._difference(template, graph, model)) > FLOAT_TOLERANCE:
            raise StageError("export", _differs(difference))
        return template, graph

    def _export(self, model: "nn.Module", layers: list[str]) -> "Template":
        from autocompress.export.template import export_template

        return export_template(
            model,
            self._sample,
            layers,
            self._task.outputs.names,
            by_keyword=self._task.inputs.kind == "dict",
        )

    def _difference(self, template: "Template", graph: "ir.Model", model: "nn.Module") -> float:
        """Largest difference of a float graph to torch on a sample, relative to the largest output."""
        import torch

        from autocompress.export.graph import to_bytes
        from autocompress.export.parity import float_difference, run_onnx

        sample = self._sample if template.dynamic_batch else {n: t[:1] for n, t in self._sample.items()}
        with torch.no_grad():
            wanted = self._task.flatten_outputs(self._task.call(model, sample))
        got = run_onnx(to_bytes(graph), {n: t.numpy() for n, t in sample.items()})
        return float_difference(got, [t.numpy() for t in wanted.values()])

    def _check_original(self) -> None:
        from autocompress.export.parity import FLOAT_TOLERANCE

        if self.float_difference > FLOAT_TOLERANCE:
            raise TaskError(_differs(self.float_difference))

    def _calibrate(self, made: _Float) -> "dict[str, ActivationStats]":
        from autocompress.export.calibrate import collect_stats

        return collect_stats(made.graph, made.template.nodes, self._calibration_feeds(made.template))

    def _calibration_feeds(self, template: "Template") -> Iterator[Mapping[str, NDArray[np.generic]]]:
        step = BATCH if template.dynamic_batch else 1
        for batch in self._batches("calibration", CALIBRATION_ITEMS, step):
            yield {name: tensor.numpy() for name, tensor in batch.items()}

    def _feeds(self, template: "Template", items: int) -> Mapping[str, NDArray[np.generic]]:
        count = min(items if template.dynamic_batch else 1, len(self._task.split("calibration")))
        return {n: t.numpy() for n, t in self._task.batch("calibration", range(count))[0].items()}

    def _settle_batches(self) -> "Iterator[dict[str, torch.Tensor]]":
        return self._batches("calibration", SETTLE_ITEMS, BATCH)

    def _batches(self, split: str, items: int, size: int) -> "Iterator[dict[str, torch.Tensor]]":
        count = min(items, len(self._task.split(split)))
        for start in range(0, count, size):
            yield self._task.batch(split, range(start, min(start + size, count)))[0]

    def _train_batches(self, seed: str) -> "Iterator[dict[str, torch.Tensor]]":
        rng = np.random.default_rng(int(seed[:16], 16))
        count = len(self._task.split("train"))
        while True:
            order = rng.permutation(count)
            for start in range(0, max(1, count - BATCH + 1), BATCH):
                yield self._task.batch("train", order[start : start + BATCH].tolist())[0]

    def _write(self, name: str, data: bytes, inputs: Any, outputs: Any) -> Artifact:
        path = self._artifacts / f"{name}.onnx"
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
        return Artifact(
            path=str(path),
            format="onnx",
            inputs=inputs,
            outputs=outputs,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
        )


def _specs(graph: "ir.Model") -> tuple[Any, Any]:
    from autocompress.export.graph import specs

    return specs(list(graph.graph.inputs)), specs(list(graph.graph.outputs))


def _topology(candidate: Candidate) -> str:
    return repr((candidate.student, sorted(candidate.widths.items())))


def _differs(difference: float) -> str:
    from autocompress.export.parity import FLOAT_TOLERANCE

    return (
        f"the exported graph does not compute what the torch model does: outputs differ by {difference:.2g} of their "
        f"largest value, at most {FLOAT_TOLERANCE:g} is accepted"
    )

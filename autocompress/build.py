"""A candidate becomes a file: compress, recover, export, check."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import AutocompressError, InputError, StageError
from autocompress.core.profile import Profile
from autocompress.core.space import Structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autocompress.export.exporter import FloatModel, Lowered, MakesExporter, Source
    from autocompress.task import CheckedTask

SETTLE_ITEMS = 128  # BatchNorm statistics are estimated anew on so many items
CALIBRATION_ITEMS = 128
BATCH = 32
_KEPT = 4  # float models kept in memory: candidates that differ in bits only share one


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


class Builder:
    """Makes artifacts of one task's model, in the format of one profile.

    Attributes:
        structure: what can be compressed.
        float_difference: largest difference of the exported original to torch, relative to the largest output.
    """

    def __init__(self, task: "CheckedTask", folder: Path, profile: Profile) -> None:
        from autocompress.compress.layers import describe

        self._task = task
        self._artifacts = folder / "artifacts"
        self._weights = folder / "weights"
        sample = task.batch("calibration", range(min(2, len(task.split("calibration")))))[0]
        found, self._groups = describe(task.model, lambda model: task.call(model, sample))
        self._exporter = exporter_of(profile)(
            task.model, [layer.name for layer in found.layers], self._source(sample), profile
        )
        self.structure = Structure(
            layers=tuple(layer for layer in found.layers if layer.name not in self._exporter.unmapped),
            groups=found.groups,
            left_alone={**found.left_alone, **self._exporter.unmapped},
        )
        self._floats: OrderedDict[str, FloatModel] = OrderedDict()
        self.float_difference = self._exporter.difference

    def build(self, candidate: Candidate, watch: Stopwatch) -> Artifact:
        """The artifact of a candidate, a file in the run's artifacts folder.

        Raises:
            StageError: it cannot be made, or does not compute what the compressed model computes.
        """
        model = self._float(candidate, watch)
        return self._write(candidate.digest, model, model.lower(candidate, watch))

    def vendor_int8(self, watch: Stopwatch) -> Artifact:
        """Uniform INT8 of the original by the runtime's own tool."""
        model = self._float(Candidate(), watch)
        return self._write("uniform-int8", model, model.vendor_int8(watch))

    def _source(self, sample: "Mapping[str, torch.Tensor]") -> "Source":
        from autocompress.export.exporter import Source

        task = self._task
        return Source(
            sample=sample,
            outputs=task.outputs.names,
            by_keyword=task.inputs.kind == "dict",
            run=lambda model, batch: task.flatten_outputs(task.call(model, dict(batch))),
            calibration=lambda size: self._batches("calibration", CALIBRATION_ITEMS, size),
        )

    def _float(self, candidate: Candidate, watch: Stopwatch) -> "FloatModel":
        from autocompress.compress.quantize import Learned

        key = candidate.weights_key
        if key not in self._floats:
            model = self._compress(candidate, watch)
            self._floats[key] = self._exporter.convert(model, candidate.shape_key, watch, Learned())
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

    def _write(self, name: str, model: "FloatModel", lowered: "Lowered") -> Artifact:
        path = self._artifacts / f"{name}{self._exporter.suffix}"
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(lowered.data)
        temporary.replace(path)
        return Artifact(
            path=str(path),
            format=self._exporter.format,
            inputs=model.inputs,
            outputs=model.outputs,
            sha256=hashlib.sha256(lowered.data).hexdigest(),
            size_bytes=len(lowered.data),
            options=lowered.options,
        )


def exporter_of(profile: Profile) -> "MakesExporter":
    """The exporter of the profile's format; with it come the packages it needs, which takes a second or two."""
    if profile.format == "onnx":
        from autocompress.export.onnx import OnnxExporter

        return OnnxExporter
    if profile.format == "tflite":
        from autocompress.export.tflite import TfliteExporter

        return TfliteExporter
    raise InputError(
        f"profile {profile.name}: no candidate is made in format {profile.format!r}: 'onnx' and 'tflite' are"
    )

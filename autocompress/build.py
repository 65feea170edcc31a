"""A candidate becomes a file: compress, recover, export, check."""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import statistics
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate, LayerChoice
from autocompress.core.errors import AutocompressError, InputError, StageError
from autocompress.core.profile import Profile
from autocompress.core.recipe import Train
from autocompress.core.record import to_json
from autocompress.core.space import Structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autocompress.compress.apply import Compressed, Setting
    from autocompress.compress.cut import Anatomy
    from autocompress.compress.material import Material
    from autocompress.export.exporter import FloatModel, Lowered, MakesExporter, Source
    from autocompress.task import CheckedTask

CALIBRATION_ITEMS = 128
BATCH = 64  # of scoring in torch
GATE_ITEMS = 1000  # validation items that a gate and an early stop look at
TIMED_STEPS = 8
SHARED_RATIOS = (1.0, 0.75, 0.5, 0.25)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A file, and what it holds: `candidate` is what was reached, `notes` say what was undone on the way and why."""

    artifact: Artifact
    candidate: Candidate
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Float:
    model: "FloatModel"
    done: Candidate
    notes: tuple[str, ...]


class Builder:
    """Makes artifacts of one task's model, in the format of one profile.

    Attributes:
        structure: what can be compressed.
        float_difference: largest difference of the exported original to torch, relative to the largest output.
    """

    def __init__(
        self,
        task: "CheckedTask",
        folder: Path,
        profile: Profile,
        progress: Callable[[str, int, int, float], None] = lambda *_: None,
    ) -> None:
        """`progress` is told of training: what, step, steps, loss."""
        from autocompress.compress.apply import Setting
        from autocompress.compress.layers import describe

        self._task = task
        self._artifacts = folder / "artifacts"
        self._weights = folder / "weights"
        sample = task.batch("calibration", range(min(2, len(task.split("calibration")))))[0]
        found, anatomy = describe(task.model, lambda model: task.call(model, sample))
        self._exporter = exporter_of(profile)(
            task.model, [layer.name for layer in found.layers], self._source(sample), profile
        )
        self.structure = Structure(
            layers=tuple(layer for layer in found.layers if layer.name not in self._exporter.unmapped),
            groups=found.groups,
            heads=found.heads,
            blocks=found.blocks,
            left_alone={**found.left_alone, **self._exporter.unmapped},
        )
        self._setting = Setting(
            original=task.model,
            anatomy=dataclasses.replace(anatomy, student=task.task.student),
            material=self._material(),
            reference=functools.cache(lambda: self._validate(task.model)),
            dialect="uint8" if profile.dialect == "uint8" else "int8",
            progress=progress,
            cache=folder / "teachers",
            shared=self._shared,
        )
        self._widths: Mapping[str, Sequence[int]] = {
            g.name: sorted({max(g.step, g.step * round(r * g.width / g.step)) for r in SHARED_RATIOS}, reverse=True)
            for g in found.groups
        }
        self._floats: OrderedDict[str, _Float] = OrderedDict()
        self.float_difference = self._exporter.difference

    @property
    def setting(self) -> "Setting":
        """What all candidates share: the original, where it can be cut, and its data."""
        return self._setting

    def allow(self, widths: Mapping[str, Sequence[int]]) -> None:
        """Let a training that all widths share be of these, by group; without any it is of a few ratios of each."""
        if widths:
            self._widths = dict(widths)

    def build(self, candidate: Candidate, watch: Stopwatch, *, fallback: bool = False) -> Built:
        """The artifact of a candidate, a file in the run's artifacts folder.

        With `fallback` it is that of the model before the stage that prepares for bits, all in float.

        Raises:
            StageError: it cannot be made, or does not compute what the compressed model computes.
        """
        made = self._float(candidate, watch, fallback=fallback)
        lowered = made.model.lower(made.done, watch)
        return Built(
            artifact=self._write((made.done if fallback else candidate).digest, made.model, lowered),
            candidate=made.done,
            notes=made.notes,
        )

    def compressed(self, candidate: Candidate, watch: Stopwatch) -> "Compressed":
        """The float model of a candidate: made, or read where this run made it before and it was not quickly done.

        Raises:
            StageError: it cannot be made, or what lies in the run cannot be read.
        """
        from autocompress.compress.apply import apply
        from autocompress.compress.kept import read, write

        path = self._weights / f"{self._weights_name(candidate)}.safetensors"
        if path.exists():
            with watch("compress"):
                return read(path, self._setting)
        made = apply(candidate, self._setting, watch)
        if candidate.recipe.recover_steps or candidate.recipe.quantizes:
            self._weights.mkdir(exist_ok=True)
            write(path, made)
        return made

    def vendor_int8(self, watch: Stopwatch) -> Artifact:
        """Uniform INT8 of the original by the runtime's own tool."""
        model = self._float(Candidate(), watch).model
        return self._write("uniform-int8", model, model.vendor_int8(watch))

    def step_seconds(self, how: Train) -> float:
        """Seconds of a training step of the whole original, taught by itself: the median of a few."""
        from autocompress.compress.recover import train

        ended: list[float] = []
        train(
            copy.deepcopy(self._task.model),
            how,
            self._setting.material,
            teachers=(self._task.model, *self._setting.material.teachers),
            steps=TIMED_STEPS,
            seed=0,
            after_step=lambda *_: ended.append(time.monotonic()),
        )
        return statistics.median(b - a for a, b in itertools.pairwise(ended))

    def _source(self, sample: "Mapping[str, torch.Tensor]") -> "Source":
        from autocompress.export.exporter import Source

        task = self._task
        return Source(
            sample=sample,
            outputs=task.outputs.names,
            by_keyword=task.inputs.kind == "dict",
            run=lambda model, batch: task.flatten_outputs(task.call(model, dict(batch))),
            calibration=lambda size: (inputs for inputs, _ in self._calibration(CALIBRATION_ITEMS, size)),
        )

    def _float(self, candidate: Candidate, watch: Stopwatch, *, fallback: bool = False) -> "_Float":
        key = candidate.weights_key + (" fallback" if fallback else "")
        if key not in self._floats:
            made = self.compressed(candidate, watch)
            if fallback and made.fallback is not None:
                made = made.fallback
            self._floats[key] = _Float(
                model=self._exporter.convert(made.model, made.done.shape_key, watch, made.learned),
                done=made.done,
                notes=made.notes,
            )
            if len(self._floats) > _KEPT:
                self._floats.popitem(last=False)
        self._floats.move_to_end(key)
        found = self._floats[key]
        bits = candidate.without_bits() if fallback else candidate
        return dataclasses.replace(found, done=_with_bits(found.done, bits))

    def _weights_name(self, candidate: Candidate) -> str:
        """Weights that were inherited depend on the widths that shared a training, which is the space's matter."""
        if not any(stage.prune is not None and stage.prune.inherit for stage in candidate.recipe.stages):
            return candidate.weights_key
        told = json.dumps({name: list(widths) for name, widths in self._widths.items()}, sort_keys=True)
        return f"{candidate.weights_key}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def _shared(self, steps: int, anatomy: "Anatomy", how: Train) -> "nn.Module":
        """The original after a training that all widths share: made once in a run, whichever process needs it first."""
        from safetensors.torch import load_file, save_file

        from autocompress.compress.elastic import train_elastic

        setting, widths = self._setting, {n: list(w) for n, w in self._widths.items()}
        orders = {group.name: group.order for group in anatomy.groups}
        told = json.dumps([steps, widths, orders, to_json(how)], sort_keys=True)
        path = self._weights / f"shared-{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"
        self._weights.mkdir(exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                model = train_elastic(
                    setting.original,
                    anatomy.groups,
                    widths,
                    setting.material,
                    how,
                    steps=steps,
                    seed=0,
                    progress=lambda step, of, loss: setting.progress("share", step, of, loss),
                    cache=setting.cache,
                )
                temporary = path.with_suffix(f".{os.getpid()}")
                save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, temporary)
                temporary.replace(path)
        model = copy.deepcopy(setting.original)
        model.load_state_dict(load_file(path))
        return model

    def _material(self) -> "Material":
        from autocompress.compress.material import Material

        task = self._task
        train = task.split("train")
        few = range(min(2, len(train)))
        return Material(
            call=task.call,
            classifies=task.task.loss is None,
            loss=task.loss if self._has_labels(few) else None,
            items=len(train),
            fetch=lambda indices: task.batch("train", indices),
            fixed=self._is_fixed(few),
            calibration=self._calibration,
            validate=self._validate,
            teachers=[build().cpu().eval() for build in task.task.teachers],
        )

    def _has_labels(self, few: range) -> bool:
        """Whether train items have targets that the loss takes; distillation needs none."""
        import torch

        inputs, targets = self._task.batch("train", few)
        try:
            with torch.no_grad():
                loss = self._task.loss(self._task.call(self._task.model, inputs), targets)
        except Exception:  # the user's loss may raise anything
            return False
        return bool(torch.isfinite(loss).all())

    def _is_fixed(self, few: range) -> bool:
        """Whether train items are the same each time they are read, as far as reading two of them three times tells."""
        first = self._task.batch("train", few)[0]
        again = (self._task.batch("train", few)[0] for _ in range(2))
        return all(bool((batch[name] == tensor).all()) for batch in again for name, tensor in first.items())

    def _validate(self, model: "nn.Module") -> float:
        """The metric of a torch model on at most so many validation items, evenly spread."""
        import torch

        task, count = self._task, len(self._task.split("validation"))
        chosen = np.unique(np.linspace(0, count - 1, min(count, GATE_ITEMS)).astype(int))
        outputs: dict[str, list[np.ndarray]] = defaultdict(list)
        targets = []
        training = model.training
        model.eval()
        for start in range(0, len(chosen), BATCH):
            inputs, wanted = task.batch("validation", chosen[start : start + BATCH].tolist())
            with torch.no_grad():
                for name, tensor in task.flatten_outputs(task.call(model, inputs)).items():
                    outputs[name].append(tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.numpy())
            targets.append(task.split("validation").targets.flatten(wanted))
        model.train(training)
        found = {name: np.concatenate(parts) for name, parts in outputs.items()}
        known = {name: np.concatenate([t[name].numpy() for t in targets]) for name in targets[0]}
        return task.metric(task.unflatten(found), task.split("validation").targets.build(known))

    def _calibration(self, items: int, size: int) -> "Iterator[tuple[dict[str, torch.Tensor], Any]]":
        count = min(items, len(self._task.split("calibration")))
        for start in range(0, count, size):
            yield self._task.batch("calibration", range(start, min(start + size, count)))

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


def _with_bits(done: Candidate, candidate: Candidate) -> Candidate:
    """What was reached for one candidate, for another one of the same weights: its bits and calibration.

    Where weights depend on bits there is no other one.
    """
    if candidate.recipe.quantizes:
        return done if candidate.has_bits else done.without_bits()
    layers = {}
    for name, choice in candidate.layers.items():
        reached = done.layers.get(name, LayerChoice())
        layers[name] = dataclasses.replace(choice, sparsity=reached.sparsity, rank=reached.rank)
    recipe = dataclasses.replace(candidate.recipe, recover_steps=done.recipe.recover_steps)
    return dataclasses.replace(done, layers=layers, float_precision=candidate.float_precision, recipe=recipe)

"""What a form of export does: a model becomes a float file's content once, and every candidate an edit of that."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from autocompress.compress.quantize import Learned
from autocompress.core.artifact import Format, TensorSpec
from autocompress.core.candidate import Candidate
from autocompress.core.profile import Profile

Batch = Mapping[str, torch.Tensor]
Watch = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an exporter needs of a task.

    Attributes:
        sample: a batch of at most two items, by input name, in the task's order.
        outputs: names of the outputs, in order.
        by_keyword: whether the model takes its inputs by name, else in order.
        run: outputs of a model for a batch, by name.
        calibration: the calibration items, in batches of at most so many.
    """

    sample: Batch
    outputs: tuple[str, ...]
    by_keyword: bool
    run: Callable[[nn.Module, Batch], dict[str, torch.Tensor]]
    calibration: Callable[[int], Iterator[Batch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """Bytes of a file, and options of the runtime that go with it (see `Artifact.options`)."""

    data: bytes
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class FloatModel(Protocol):
    """A compressed model in float, from which the candidates of equal weights are made."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the task's order."""

    def lower(self, candidate: Candidate, watch: Watch) -> Lowered:
        """The file of a candidate; stages "calibrate", "export" and "check".

        Raises:
            StageError: it cannot be made, or does not compute what it should.
        """

    def vendor_int8(self, watch: Watch) -> Lowered:
        """Uniform INT8 by the runtime vendor's own tool, at the settings it recommends for the device.

        Raises:
            StageError: the tool fails on this model.
        """


class Exporter(Protocol):
    """A form of export for one task and one profile.

    Attributes:
        format: of its files.
        suffix: of their names.
        unmapped: layers that are not to be found in the exported original, with the reason.
        difference: largest difference of the exported original to torch, relative to the largest output.
    """

    format: Format
    suffix: str
    unmapped: Mapping[str, str]
    difference: float

    def convert(self, model: nn.Module, topology: str, watch: Watch, learned: Learned) -> FloatModel:
        """The model in float; models of equal `topology` differ in weights only. Stages "export" and "check".

        What is `learned` of its layers stands for what the exporter would find itself.

        Raises:
            StageError: it cannot be exported, or its outputs differ from torch's; stage "export".
        """


class MakesExporter(Protocol):
    """An exporter's constructor."""

    def __call__(self, model: nn.Module, layers: list[str], source: Source, profile: Profile) -> Exporter:
        """Export `model`, the original in eval mode, whose compressible layers are `layers`.

        Raises:
            TaskError: it cannot be exported at all.
        """

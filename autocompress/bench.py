"""Candidates of one model compared with one of them: built, checked against fp32, timed in one round-robin."""

import math
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autocompress.build import Builder, Stopwatch
from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError
from autocompress.core.measurement import Measurement
from autocompress.core.probe import Effect
from autocompress.core.profile import Profile
from autocompress.device.hosts import Host

if TYPE_CHECKING:
    from torch import nn

    from autocompress.task import CheckedTask

ITEMS = 8  # what outputs are compared on, and what settles and calibrates
AT_ONCE = 16  # candidates in one round-robin: all are in memory together

Key = TypeVar("Key", bound=Hashable)
Timed = tuple[Artifact, Measurement]
Arrays = Mapping[str, NDArray[np.generic]]


def bench_task(name: str, model: "nn.Module", items: Sequence[Any]) -> "CheckedTask":
    """A task that is only run and timed: every split is `items`, inputs without a batch dimension.

    Raises:
        TaskError: the model does not do what a task's model must.
    """
    import torch

    from autocompress.task import Task, check_task

    data = [(item, 0) for item in items]
    return check_task(
        Task(
            name=name,
            model=lambda: model,
            train=data,
            validation=data,
            calibration=data,
            metric=lambda *_: 0.0,
            loss=lambda *_: torch.zeros(()),
        )
    )


def few(task: "CheckedTask") -> "CheckedTask":
    """The task's model with its first calibration items."""
    data = task.split("calibration").data
    return bench_task(task.task.name, task.model, [data[i][0] for i in range(min(ITEMS, len(data)))])


class Bench:
    """Builds candidates of one model and compares them on the device.

    Attributes:
        builder: of their files.
        profile: of the device.
    """

    def __init__(self, task: "CheckedTask", profile: Profile, host: Host, folder: Path) -> None:
        """Prepare in `folder`, which is made.

        Raises:
            TaskError: the model cannot be exported.
        """
        (folder / "artifacts").mkdir(parents=True)
        self.profile = profile
        self.builder = Builder(task, folder, profile)
        self._host = host
        self._inputs = folder / "inputs"
        self._outputs = task.outputs.names
        task.write_split("calibration", self._inputs)
        self._fp32: Arrays | None = None

    def compare(self, base: Candidate, others: Mapping[Key, Candidate], *, right: bool) -> dict[Key, Effect | str]:
        """The effect of each of `others` against `base`, or what is wrong with it, by key.

        Args:
            right: whether outputs are compared with fp32's.

        Raises:
            StageError: `base` or fp32 fails.
        """
        reference = self._built(base)
        found: dict[Key, Effect | str] = {}
        for key, timed in self._timed(reference, others).items():
            try:
                found[key] = timed if isinstance(timed, str) else self._effect(reference, *timed, right)
            except StageError as error:
                found[key] = f"{error.stage}: {error}"
        return found

    def measure(self, base: Candidate, others: Mapping[Key, Candidate]) -> dict[Key, Measurement]:
        """Latency of those of `others` that can be built and run, against `base`.

        Raises:
            StageError: `base` fails.
        """
        timed = self._timed(self._built(base), others)
        return {key: found[1] for key, found in timed.items() if not isinstance(found, str)}

    def _timed(self, reference: Artifact, others: Mapping[Key, Candidate]) -> dict[Key, Timed | str]:
        found: dict[Key, Timed | str] = {}
        built: dict[Key, Artifact] = {}
        for key, candidate in others.items():
            try:
                built[key] = self._built(candidate)
            except StageError as error:
                found[key] = f"{error.stage}: {error}"
        for keys in _chunks(list(built)):
            found |= self._round_robin(reference, {key: built[key] for key in keys})
        return {key: found[key] for key in others}

    def _round_robin(self, reference: Artifact, artifacts: Mapping[Key, Artifact]) -> dict[Key, Timed | str]:
        """All together; where that fails one of them is at fault, and each is timed alone."""
        try:
            measured = self._host.measure([reference, *artifacts.values()], self._inputs)
            return {k: (a, m) for (k, a), m in zip(artifacts.items(), measured, strict=True)}
        except StageError as error:
            if len(artifacts) == 1:
                return dict.fromkeys(artifacts, f"{error.stage}: {error}")
        found: dict[Key, Timed | str] = {}
        for key, artifact in artifacts.items():
            found |= self._round_robin(reference, {key: artifact})
        return found

    def _effect(self, reference: Artifact, artifact: Artifact, measured: Measurement, right: bool) -> Effect:
        if right and self._fp32 is None:
            self._fp32 = self._run(self._built(Candidate()))
        return Effect(
            ratio=measured.ratio,
            ratio_ci=measured.ratio_ci,
            size_ratio=artifact.size_bytes / reference.size_bytes,
            sqnr_db=sqnr_db(self._fp32, self._run(artifact)) if right and self._fp32 is not None else None,
        )

    def _built(self, candidate: Candidate) -> Artifact:
        return self.builder.build(candidate, Stopwatch()).artifact

    def _run(self, artifact: Artifact) -> Arrays:
        with tempfile.TemporaryDirectory(prefix="autocompress-") as out:
            self._host.outputs(artifact, self._inputs, Path(out))
            return {name: np.load(Path(out) / f"{name}.npy") for name in self._outputs}


def sqnr_db(wanted: Arrays, got: Arrays) -> float | None:
    """Power of the floating `wanted` outputs over that of the difference to them, decibels; None where equal."""
    signal = noise = 0.0
    for name, array in wanted.items():
        if array.dtype.kind == "f":
            signal += float(np.square(array, dtype=np.float64).sum())
            noise += float(np.square(np.subtract(array, got[name], dtype=np.float64)).sum())
    if noise == 0:
        return None
    return 10 * math.log10(max(signal, np.finfo(np.float64).tiny) / noise)


def _chunks(keys: Sequence[Key]) -> Iterable[Sequence[Key]]:
    return (keys[i : i + AT_ONCE] for i in range(0, len(keys), AT_ONCE))

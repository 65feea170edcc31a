"""Measuring and scoring files that were measured before: what verifying and re-profiling share."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from autocompress.core.artifact import Artifact
from autocompress.core.cascade import LARGE, Cascade, Runnable
from autocompress.core.errors import StageError, TaskError
from autocompress.core.measurement import Fingerprint, Interval, Measurement, merge
from autocompress.device.hosts import Host

if TYPE_CHECKING:
    from autocompress.scoring import PairedBootstrap
    from autocompress.task import CheckedTask

# Which kernels run, and so what an integer model computes, depends on these facts and no others:
# without VNNI or its like, 8-bit products saturate on x86, and the same file has another accuracy.
NUMERIC_FACTS = ("runtime", "arch", "flags")


def rounds(
    host: Host,
    reference: Artifact,
    artifact: Runnable,
    inputs: Path,
    processes: int,
    rows: Sequence[int] = (0,),
) -> list[Measurement]:
    """Latency of `artifact` against `reference` in each of so many fresh processes, over these items."""
    return [host.measure([reference, artifact], inputs, fresh=True, rows=rows)[0] for _ in range(processes)]


def measure_again(
    host: Host,
    reference: Artifact,
    artifacts: Sequence[Runnable],
    inputs: Path,
    processes: int,
    rows: Sequence[int] = (0,),
) -> list[Measurement]:
    """Latency of `artifacts` against `reference`, interleaved, over so many fresh processes and these items."""
    taken = [host.measure([reference, *artifacts], inputs, fresh=True, rows=rows) for _ in range(processes)]
    return [merge(parts) for parts in zip(*taken, strict=True)]


def measure_usable(
    host: Host, reference: Artifact, artifacts: Mapping[int, Artifact], inputs: Path, processes: int
) -> tuple[dict[int, Measurement], dict[int, str]]:
    """Measurements by trial number, and what was said of files that fail here; fp32 failing is raised.

    All take turns in one process, so one bad file fails them all: then each is tried alone, and the rest again.
    """
    failed: dict[int, str] = {}
    try:
        found = measure_again(host, reference, list(artifacts.values()), inputs, processes)
    except StageError:
        host.measure([reference, reference], inputs, fresh=True)
        for number, artifact in artifacts.items():
            try:
                host.measure([reference, artifact], inputs, fresh=True)
            except StageError as error:
                failed[number] = f"{error.stage}: {error}"
        artifacts = {n: a for n, a in artifacts.items() if n not in failed}
        found = measure_again(host, reference, list(artifacts.values()), inputs, processes)
    return dict(zip(artifacts, found, strict=True)), failed


def same_numbers(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether a file computes the same on both machines, as far as their fingerprints tell."""
    return all(before.facts.get(name) == now.facts.get(name) for name in NUMERIC_FACTS)


def open_task(reference: str | None, name: str) -> "CheckedTask":
    """The task a run or a package was made from.

    Raises:
        TaskError: it cannot be loaded here, or is another one.
    """
    from autocompress.task import check_task, load_task

    if reference is None:
        raise TaskError("the task was handed over in Python and cannot be loaded by name")
    checked = check_task(load_task(reference))
    if checked.task.name != name:
        raise TaskError(f"{reference} is the task {checked.task.name!r} now, not {name!r}")
    return checked


@dataclass(kw_only=True)
class Scorer:
    """Scores files on all of a split, through their runtime, with intervals against fp32 on the same items.

    The split's inputs are written into `folder` once, on first use.
    """

    task: "CheckedTask"
    host: Host
    fp32: Artifact
    folder: Path
    split: str = "validation"
    _bootstrap: "PairedBootstrap | None" = field(default=None, init=False)
    _written: bool = field(default=False, init=False)

    def accuracy(self, artifact: Runnable) -> float:
        """The task's metric."""
        return self.metric(self.outputs(artifact))

    def metric(self, outputs: Mapping[str, Any]) -> float:
        """The task's metric of outputs by name."""
        return self.task.metric(self.task.unflatten(outputs), self.task.targets(self.split))

    def score(self, artifact: Runnable) -> tuple[float, Interval | None, str | None]:
        """Accuracy, its interval against fp32 on the same items, and the reason where there is none."""
        return self.judge(self.outputs(artifact))

    def judge(self, outputs: Mapping[str, Any]) -> tuple[float, Interval | None, str | None]:
        """`score` of outputs by name."""
        from autocompress.scoring import PairedBootstrap

        if self._bootstrap is None:
            reference = self.task.unflatten(self.outputs(self.fp32))
            items, targets = len(self.task.split(self.split)), self.task.targets(self.split)
            self._bootstrap = PairedBootstrap(self.task.metric, reference, targets, items, self.task.by_item)
        interval = self._bootstrap.interval(self.task.unflatten(outputs))
        return self.metric(outputs), interval, self._bootstrap.reason

    def outputs(self, artifact: Runnable) -> dict[str, NDArray[Any]]:
        """Outputs by name, of a cascade with LARGE."""
        from autocompress.scoring import read_outputs

        if not self._written:
            self.task.write_split(self.split, self.folder)
            self._written = True
        names = (*self.task.outputs.names, *([LARGE] if isinstance(artifact, Cascade) else []))
        with tempfile.TemporaryDirectory(prefix="autocompress-") as out:
            self.host.outputs(artifact, self.folder, Path(out))
            return read_outputs(Path(out), names)


def changed(facts: Mapping[str, tuple[str | None, str | None]]) -> str:
    """Changed facts of a machine in one line."""
    return "; ".join(f"{name}: {before or 'unknown'} → {now or 'unknown'}" for name, (before, now) in facts.items())


Progress = Callable[[str], None]


def silent(_: str) -> None:
    """Says nothing."""

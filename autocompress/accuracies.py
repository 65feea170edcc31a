"""Accuracy of files by their runtime, each scored once, and no further than is of use."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.core.artifact import Artifact
from autocompress.core.front import Rival
from autocompress.core.measurement import Interval
from autocompress.device.hosts import Host

if TYPE_CHECKING:
    from autocompress.races import Race
    from autocompress.scoring import PairedBootstrap
    from autocompress.task import CheckedTask

Watch = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What a file gives over validation; `items` as in a Score, and `reasons` of what there is none of."""

    value: float
    interval: Interval | None
    items: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


class Accuracies:
    """Scores files of one task through their runtime, and remembers by their bytes.

    Args:
        inputs: gives the folder of a split's inputs.
    """

    def __init__(self, task: "CheckedTask", host: Host, inputs: Callable[[str], Path]) -> None:
        self._task = task
        self._host = host
        self._inputs = inputs
        self._known: dict[str, Accuracy] = {}
        self._bootstrap: PairedBootstrap | None = None
        self._race: Race | None = None

    def take_up(self, artifact: Artifact, accuracy: Accuracy) -> None:
        """Keep what is known already of a file."""
        self._known.setdefault(artifact.key, accuracy)

    def known(self, artifact: Artifact) -> Accuracy:
        """Of a file that was scored."""
        return self._known[artifact.key]

    def of(
        self,
        artifact: Artifact,
        fp32: Artifact,
        watch: Watch,
        *,
        ratio_ci: Interval | None = None,
        rivals: Sequence[Rival] = (),
    ) -> Accuracy:
        """Accuracy over validation, or over a part where that settles that a rival is better.

        Args:
            ratio_ci: of the file's latency; None where all items are wanted.
            rivals: what it has to be compared with.
        """
        found = self._known.get(artifact.key)
        if found is not None and found.items is None:
            return found
        if ratio_ci is not None and rivals and (partial := self._raced(artifact, fp32, ratio_ci, rivals, watch)):
            self._known[artifact.key] = partial
            return partial
        with watch("score"):
            outputs = self._task.unflatten(self._outputs(artifact, self._inputs("validation")))
            value = self._task.metric(outputs, self._task.targets("validation"))
        with watch("interval"):
            bootstrap = self._paired(fp32, outputs if fp32.key == artifact.key else None)
            interval = bootstrap.interval(outputs)
        reasons = dict(self._host.reasons)
        if bootstrap.reason is not None:
            reasons["accuracy_ci"] = bootstrap.reason
        self._known[artifact.key] = Accuracy(value=value, interval=interval, reasons=reasons)
        return self._known[artifact.key]

    def on_test(self, artifact: Artifact) -> tuple[float | None, dict[str, str]]:
        """The metric on the test split, or why there is none."""
        if "test" not in self._task.splits:
            return None, {"test_accuracy": "the task has no test split"}
        outputs = self._task.unflatten(self._outputs(artifact, self._inputs("test")))
        return self._task.metric(outputs, self._task.targets("test")), {}

    def _raced(
        self, artifact: Artifact, fp32: Artifact, ratio_ci: Interval, rivals: Sequence[Rival], watch: Watch
    ) -> Accuracy | None:
        """What a part of validation says, where that is enough."""
        from autocompress.races import FEWEST, Race

        by_item = self._task.by_item
        if by_item is None or len(self._task.split("validation")) < FEWEST:
            return None
        with watch("score"):
            if self._race is None:
                reference = self._task.unflatten(self._outputs(fp32, self._inputs("validation")))
                self._race = Race(self._inputs("validation"), by_item, reference, self._task.targets("validation"))
            outputs = self._task.unflatten(self._outputs(artifact, self._race.inputs))
            found = self._race.judge(outputs, ratio_ci, rivals)
        if found is None:
            return None
        reasons = dict(self._host.reasons) | {
            "accuracy": f"of {found.items} validation items, and fp32 on all: they show that a faster model is better"
        }
        return Accuracy(value=found.accuracy, interval=found.interval, items=found.items, reasons=reasons)

    def _paired(self, fp32: Artifact, its_outputs: Any) -> "PairedBootstrap":
        from autocompress.scoring import PairedBootstrap

        if self._bootstrap is None:
            task = self._task
            if its_outputs is None:
                its_outputs = task.unflatten(self._outputs(fp32, self._inputs("validation")))
            items = len(task.split("validation"))
            self._bootstrap = PairedBootstrap(task.metric, its_outputs, task.targets("validation"), items, task.by_item)
        return self._bootstrap

    def _outputs(self, artifact: Artifact, inputs: Path) -> Mapping[str, Any]:
        """Outputs of a file over a folder of inputs, by its runtime, in memory."""
        from autocompress.scoring import read_outputs

        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            self._host.outputs(artifact, inputs, Path(folder))
            return read_outputs(Path(folder), self._task.outputs.names)

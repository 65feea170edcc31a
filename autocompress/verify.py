"""Does a package still give its recorded figures, where it stands?"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autocompress.cascade import mixed_rows
from autocompress.core.cascade import LARGE, files_of
from autocompress.core.errors import StageError, TaskError, VerifyError
from autocompress.core.measurement import Interval, merge, overlap
from autocompress.device.hosts import Host, open_host
from autocompress.package import Arrays, Package, read_package
from autocompress.remeasure import Progress, Scorer, changed, open_task, rounds, silent

# Integer kernels of another processor round some products otherwise; a changed model differs by far more.
OUTPUT_TOLERANCE = 0.02
# Where the metric is too slow for an interval, the same file must give the same figure, but for its rounding.
ACCURACY_TOLERANCE = 1e-3
# An interval tells what one session's noise is. Two sessions of one file, on one busy machine, were up to 5 % further
# apart than theirs (0.405 and 0.417, 0.661 and 0.690 of fp32); another model is further off than that, or no loss.
SESSION_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A package's figures, recorded and now.

    Attributes:
        trial: what was picked; of a cascade the large model, and `cascade` names both and the rule.
        machine: facts that differ, as name → (recorded, now).
        ratio, ratio_now: intervals of the latency over fp32's.
        accuracy_now: on all of validation; None where the task does not load here, and `accuracy_reason` says why.
        executed: layers that ran in another precision than recorded, as name → (recorded, now); empty where neither the
            record nor the runtime tells.
        output_difference: root mean square difference of the outputs on the sample, over that of the outputs.
    """

    package: str
    trial: int
    cascade: str | None
    machine: Mapping[str, tuple[str | None, str | None]]
    ratio: Interval
    ratio_now: Interval
    accuracy: float
    accuracy_range: Interval
    accuracy_now: float | None
    accuracy_reason: str | None
    executed: Mapping[str, tuple[str, str]]
    output_difference: float
    sample_items: int

    @property
    def faults(self) -> tuple[str, ...]:
        """What is not as recorded, a sentence each; empty for a package that holds."""
        found = []
        if _apart(self.ratio, self.ratio_now):
            found.append(f"latency over fp32's is {_text(self.ratio_now)}, recorded was {_text(self.ratio)}")
        low, high = self.accuracy_range
        if self.accuracy_now is not None and not low <= self.accuracy_now <= high:
            found.append(f"accuracy is {self.accuracy_now:.4f}, outside the recorded [{low:.4f}, {high:.4f}]")
        if not self.output_difference <= OUTPUT_TOLERANCE:
            found.append(
                f"outputs on the sample differ by {self.output_difference:.1%}, at most {OUTPUT_TOLERANCE:.0%}"
            )
        return tuple(found)

    def lines(self) -> list[str]:
        """The comparison for people."""
        now = self.accuracy_now
        scored = f"not scored now: {self.accuracy_reason}" if now is None else f"{now:.4f} now"
        return [
            f"{self.package}: every file is as it was written ({self.cascade or f'trial {self.trial}'})",
            f"machine: {changed(self.machine) or 'the same'}",
            f"latency over fp32's: {_text(self.ratio)} recorded, {_text(self.ratio_now)} now",
            f"accuracy: {self.accuracy:.4f} recorded, {scored}",
            f"layers that run in another precision: {changed(self.executed) or 'none'}",
            f"outputs on {self.sample_items} sample items: {self.output_difference:.2g} apart, relative",
        ]

    def require(self) -> None:
        """Raise VerifyError where something is outside."""
        if self.faults:
            again = f"reprofile {self.package}`" if self.cascade is None else "reprofile` of its run"
            elsewhere = (
                f" The machine is another one ({changed(self.machine)}): `autocompress {again} says what holds on it."
            )
            raise VerifyError(f"{'; '.join(self.faults)}.{elsewhere if self.machine else ''}")


def verify_package(
    path: Path | str, host: Host | None = None, *, on: str | None = None, progress: Progress = silent
) -> Verification:
    """Compare a package with its record: its files' hashes, its latency against fp32, its accuracy and outputs.

    A latency whose interval stays more than a tenth away from the recorded one is measured a second time before it
    counts: intervals tell the noise within a session, and sessions differ by more.

    Args:
        host: measures in the place of the device.
        on: where the device is, as `--on` takes it; default is as the package's profile says.

    Raises:
        PackageError: it is no package, or a file is missing or was changed.
        TargetError: its runtime is not usable here.
        VerifyError: a file does not run here.
    """
    package = read_package(path)
    try:
        if host is not None:
            return _verify(package, host, progress)
        profile = package.manifest.profile
        with open_host(on or profile.host, profile) as found:
            return _verify(package, found, progress)
    except StageError as error:
        raise VerifyError(f"{package.path} does not run here: {error.stage}: {error}") from error


def _verify(package: Package, host: Host, progress: Progress) -> Verification:
    manifest, score = package.manifest, package.score
    with package.inputs() as inputs, tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        progress("comparing outputs on the sample")
        difference = _difference(package, host, inputs, Path(scratch))
        executed = _executed(package, host, inputs)
        processes = manifest.profile.measure.processes
        progress(f"measuring in {processes} fresh processes")
        rows = _rows(package, Path(scratch))
        parts = rounds(host, package.baseline, package.model, inputs, processes, rows)
        if _apart(score.ratio_ci, merge(parts).ratio_ci):
            progress("outside what was recorded: measuring a second time")
            parts += rounds(host, package.baseline, package.model, inputs, processes, rows)
        measured = merge(parts)
        progress("scoring on validation")
        accuracy, reason = _rescore(package, host)
    tolerance = ACCURACY_TOLERANCE * max(1.0, abs(score.accuracy))
    return Verification(
        package=str(package.path),
        trial=manifest.trial.number,
        cascade=None if manifest.cascade is None else manifest.cascade.name,
        machine=manifest.fingerprint.changes(measured.fingerprint),
        ratio=score.ratio_ci,
        ratio_now=measured.ratio_ci,
        accuracy=score.accuracy,
        accuracy_range=score.accuracy_ci or (score.accuracy - tolerance, score.accuracy + tolerance),
        accuracy_now=accuracy,
        accuracy_reason=reason,
        executed=executed,
        output_difference=difference,
        sample_items=manifest.sample_items,
    )


def _rows(package: Package, outputs: Path) -> list[int]:
    """Items of the sample to measure with: for a cascade as many that go on as did when it was picked."""
    cascade = package.manifest.cascade
    if cascade is None:
        return [0]
    large = np.load(outputs / f"{LARGE}.npy", allow_pickle=False)
    return mixed_rows(large, cascade.share, cascade.score.latency_ms)


def _executed(package: Package, host: Host, inputs: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    picked = package.manifest.picked
    for trial, file in zip(picked, files_of(package.model), strict=True):
        ran, before = host.executed(file, inputs) or {}, (trial.score and trial.score.executed) or {}
        of = f" of trial {trial.number}" if len(picked) > 1 else ""
        found |= {f"{n}{of}": (was, ran[n]) for n, was in before.items() if ran.get(n, was) != was}
    return found


def _rescore(package: Package, host: Host) -> tuple[float | None, str | None]:
    try:
        task = open_task(package.manifest.task, package.manifest.task_name)
    except TaskError as error:
        return None, str(error)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        scorer = Scorer(task=task, host=host, fp32=package.baseline, folder=Path(folder))
        return scorer.accuracy(package.model), None


def _difference(package: Package, host: Host, inputs: Path, out: Path) -> float:
    """The largest relative difference of an output; infinite where a shape differs."""
    host.outputs(package.model, inputs, out)
    recorded: Arrays = package.sample_outputs()
    worst = 0.0
    for name, before in recorded.items():
        now = np.load(out / f"{name}.npy", allow_pickle=False)
        if now.shape != before.shape:
            return float("inf")
        scale = float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))
        apart = float(np.sqrt(np.mean(np.square(now.astype(np.float64) - before))))
        worst = max(worst, apart / max(scale, 1e-12))
    return worst


def _apart(recorded: Interval, now: Interval) -> bool:
    """Whether two sessions' ratios differ by more than sessions of one file do."""
    low, high = recorded
    return not overlap((low * (1 - SESSION_TOLERANCE), high * (1 + SESSION_TOLERANCE)), now)


def _text(interval: Interval) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"

"""One candidate → one Score or Failure: build the file, score it in its runtime, time it on its device."""

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.build import Builder, Built, Stopwatch, exporter_of
from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError
from autocompress.core.front import Rival
from autocompress.core.measurement import Interval, Measurement
from autocompress.core.probe import paying
from autocompress.core.profile import Profile
from autocompress.core.recipe import Train
from autocompress.core.sensitivity import Sensitivity
from autocompress.core.space import Space, SpaceRules, Structure, with_stages_that_pay
from autocompress.core.trial import Failure, Role, Score, Trial
from autocompress.device.hosts import Host
from autocompress.place import fitted
from autocompress.probe import payoff_of, subject_of
from autocompress.progress import Progress, Training

if TYPE_CHECKING:
    from autocompress.run import Run
    from autocompress.scoring import PairedBootstrap
    from autocompress.task import CheckedTask

NOT_IN_SEARCH = "measured for the finished front only"


class Evaluator:
    """Evaluates candidates of one task on one device, and remembers what need not be done twice.

    Attributes:
        structure: what of the model can be compressed.
        space: the variables of the search.
    """

    def __init__(
        self,
        task: "CheckedTask",
        run: "Run",
        profile: Profile,
        rules: SpaceRules,
        host: Host,
        progress: Progress | None = None,
    ) -> None:
        self._task = task
        self._run = run
        self._host = host
        self._progress = progress
        with ThreadPoolExecutor(1) as pool:  # the worker starts while the exporter's packages are imported
            asked = pool.submit(host.fingerprint)
            exporter_of(profile)
            facts = asked.result().facts
        profile, lacking = fitted(profile, facts)
        self._profile = profile
        self._builder = Builder(task, run.path, profile, Training(progress) if progress else lambda *_: None)
        self.structure: Structure = self._builder.structure
        space = rules.resolve(self.structure, profile, has_student=task.task.student is not None)
        space = dataclasses.replace(space, dropped={**lacking, **space.dropped})
        payoff = payoff_of(run, subject_of(task, self.structure, profile), facts)
        self.space: Space = with_stages_that_pay(space if payoff is None else paying(space, payoff))
        self._with_memory = "memory" in run.config.objectives or run.config.limits.max_memory_mb is not None
        self._with_energy = "energy" in run.config.objectives
        self._items = len(task.split("validation"))
        self._written: set[str] = set()
        self._bootstrap: PairedBootstrap | None = None
        self._reference: Artifact | None = None
        self._reference_ms: float | None = None
        self._latency: dict[str, _Latency] = {}
        self._accuracy: dict[str, dict[str, Any]] = {}
        run.log(
            "model",
            float_difference=self._builder.float_difference,
            layers=len(self.structure.layers),
            groups=len(self.structure.groups),
            left_alone=dict(self.structure.left_alone),
            dropped=dict(self.space.dropped),
            variables=len(self.space.variables),
        )
        for trial in run.trials():
            self._remember(trial)

    @property
    def lessons(self) -> tuple[int, int]:
        """Train items, and how many a training step takes."""
        return len(self._task.split("train")), self._training.batch_size

    def step_seconds(self) -> float:
        """Seconds of a training step of the whole original."""
        return self._builder.step_seconds(self._training)

    @property
    def _training(self) -> Train:
        """How the first recipe that trains does it."""
        stages = (stage.train for plan in self.space.recipes for stage in plan.stages)
        return next((found for found in stages if found is not None), Train())

    def sensitivity(self, seconds: float, int8_ratio: float | None) -> Sensitivity:
        """What each choice alone does to the outputs, as far as it is found out within so many seconds."""
        from autocompress.sensitivity import probe_sensitivity

        return probe_sensitivity(
            self._builder,
            self.space,
            task=self._task,
            target=self._profile.name,
            int8_ratio=int8_ratio,
            seconds=seconds,
            progress=self._progress,
        )

    def evaluate(self, candidate: Candidate, role: Role, *, rivals: Sequence[Rival] = ()) -> Trial:
        """One finished trial, without its number. A candidate's fault is a Failure in it, never an exception.

        Raises:
            TargetError: the runtime is not usable, which no other candidate would change.
        """
        watch = Stopwatch()
        made: list[Artifact] = []
        measured: list[Measurement] = []
        latency_from = None
        notes: tuple[str, ...] = ()
        outcome: Score | Failure
        try:
            built = self._build(candidate, role, watch)
            made.append(built.artifact)
            if role == "fp32":
                self._reference = built.artifact
            figures = self._accuracy_of(built.artifact, watch)
            if role == "candidate" and (why := self._against(built, figures["accuracy"])) is not None:
                built = self._builder.build(candidate, watch, fallback=True)
                built = dataclasses.replace(built, notes=(*built.notes, why))
                made[0], figures = built.artifact, self._accuracy_of(built.artifact, watch)
            candidate, notes = built.candidate, built.notes
            key = self._latency_key(candidate, role)
            if key not in self._latency:
                measured.append(self._measure(made[0], watch))
                executed, diagnosis = self._executed(made[0], watch)
                if role == "fp32":
                    self._reference_ms = measured[0].reference_ms
                self._latency[key] = _Latency.of(measured[0], executed, diagnosis)
            else:
                latency_from = self._latency[key].artifact
            meters = self._meters(made[0], watch, memory=self._with_memory, energy=self._with_energy)
            meters["reasons"] |= figures.pop("reasons")
            figures |= meters
            outcome = self._score(made[0], self._latency[key], figures)
        except StageError as error:
            cause = error.__cause__ or error
            outcome = Failure(stage=error.stage, error=type(cause).__name__, message=str(error))
        return Trial(
            number=-1,
            role=role,
            candidate=candidate,
            outcome=outcome,
            artifact=self._relative(made[0]) if made else None,
            measurement=measured[0] if measured else None,
            latency_from=latency_from,
            seconds=dict(watch.seconds),
            notes=notes,
        )

    def _build(self, candidate: Candidate, role: Role, watch: Stopwatch) -> Built:
        if role == "uniform-int8":
            return Built(artifact=self._builder.vendor_int8(watch), candidate=candidate)
        return self._builder.build(candidate, watch)

    def _against(self, built: Built, accuracy: float) -> str | None:
        """Why a file does not pass the gate of the stage that prepares for its bits, None where it does."""
        stage = built.candidate.recipe.last_gate
        if stage is None or stage.gate is None or not built.candidate.has_bits:
            return None
        lost = 100 * (self._accuracy[self._known_reference().key]["accuracy"] - accuracy)
        if lost <= stage.gate:
            return None
        return f"stage {stage.name!r} was undone: its file lost {lost:.2f} points, the limit is {stage.gate:g}"

    def finalise(self, trials: Sequence[Trial]) -> list[Trial]:
        """These trials measured again, round-robin in fresh processes, with test accuracy and peak memory.

        A model that fails now is dropped, and the log says so; fp32 must be among them.

        Raises:
            StageError: fp32 fails.
        """
        from autocompress.remeasure import measure_usable

        reference = self._artifact_of(next(t for t in trials if t.role == "fp32"))
        artifacts = {t.number: self._artifact_of(t) for t in trials if t.score is not None}
        again, failed = measure_usable(
            self._host, reference, artifacts, self._inputs("validation"), self._profile.measure.processes
        )
        reference_ms = statistics.median(m.reference_ms for m in again.values())
        finished = []
        for trial in (t for t in trials if t.number in again):
            try:
                finished.append(self._finished(trial, artifacts[trial.number], again[trial.number], reference_ms))
            except StageError as error:
                if trial.role == "fp32":
                    raise
                failed[trial.number] = f"{error.stage}: {error}"
        for number, why in failed.items():
            self._run.log("dropped", number=number, message=why)
        return finished

    def _finished(self, trial: Trial, artifact: Artifact, measurement: Measurement, reference_ms: float) -> Trial:
        score = trial.score
        assert score is not None
        try:
            figures = self._meters(artifact, Stopwatch(), memory=True, energy=True)
        except StageError as error:  # it has just been measured: what cannot be read here is memory
            figures = self._meters(artifact, Stopwatch(), memory=False, energy=True)
            figures["reasons"]["peak_memory_bytes"] = str(error)
        tested = self._test_accuracy(artifact)
        again = {name: why for name, why in score.reasons.items() if name in ("accuracy", "accuracy_ci", "executed")}
        low, high = measurement.ratio_ci
        return dataclasses.replace(
            trial,
            measurement=measurement,
            latency_from=None,
            outcome=dataclasses.replace(
                score,
                latency_ms=measurement.ratio * reference_ms,
                latency_ms_ci=(low * reference_ms, high * reference_ms),
                ratio=measurement.ratio,
                ratio_ci=measurement.ratio_ci,
                peak_memory_bytes=figures["peak_memory_bytes"],
                energy_mj=figures["energy_mj"],
                test_accuracy=tested[0],
                reasons=again | figures["reasons"] | tested[1],
            ),
        )

    def _test_accuracy(self, artifact: Artifact) -> tuple[float | None, dict[str, str]]:
        if "test" not in self._task.splits:
            return None, {"test_accuracy": "the task has no test split"}
        outputs = self._task.unflatten(self._outputs(artifact, "test"))
        return self._task.metric(outputs, self._task.targets("test")), {}

    def _meters(self, artifact: Artifact, watch: Stopwatch, *, memory: bool, energy: bool) -> dict[str, Any]:
        """Peak memory and energy, each a number or None with its reason."""
        figures: dict[str, Any] = {"peak_memory_bytes": None, "energy_mj": None, "reasons": {}}
        inputs = self._inputs("validation")
        if memory:
            with watch("memory"):
                figures["peak_memory_bytes"] = self._host.peak_memory(artifact, inputs)
        else:
            figures["reasons"]["peak_memory_bytes"] = f"{NOT_IN_SEARCH}, unless memory is an objective or limited"
        if energy:
            with watch("energy"):
                found = self._host.energy(artifact, inputs)
            if isinstance(found, str):
                figures["reasons"]["energy_mj"] = found
            else:
                figures["energy_mj"] = found
        else:
            figures["reasons"]["energy_mj"] = f"{NOT_IN_SEARCH}, unless energy is an objective"
        return figures

    def _accuracy_of(self, artifact: Artifact, watch: Stopwatch) -> dict[str, Any]:
        """Accuracy of a file over validation with its interval; not computed twice for the same bytes."""
        if artifact.key not in self._accuracy:
            with watch("score"):
                outputs = self._task.unflatten(self._outputs(artifact, "validation"))
                accuracy = self._task.metric(outputs, self._task.targets("validation"))
            with watch("interval"):
                bootstrap = self._paired(artifact, outputs)
                interval = bootstrap.interval(outputs)
            reasons = dict(self._host.reasons)
            if bootstrap.reason is not None:
                reasons["accuracy_ci"] = bootstrap.reason
            self._accuracy[artifact.key] = {"accuracy": accuracy, "accuracy_ci": interval, "reasons": reasons}
        return dict(self._accuracy[artifact.key])

    def _paired(self, artifact: Artifact, outputs: Any) -> "PairedBootstrap":
        from autocompress.scoring import PairedBootstrap

        if self._bootstrap is None:
            reference = self._known_reference()
            same = reference.key == artifact.key
            kept = outputs if same else self._task.unflatten(self._outputs(reference, "validation"))
            self._bootstrap = PairedBootstrap(
                self._task.metric, kept, self._task.targets("validation"), self._items, self._task.by_item
            )
        return self._bootstrap

    def _outputs(self, artifact: Artifact, split: str) -> Mapping[str, Any]:
        """Outputs of a file over a split, by its runtime, in memory."""
        from autocompress.scoring import read_outputs

        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            self._host.outputs(artifact, self._inputs(split), Path(folder))
            return read_outputs(Path(folder), self._task.outputs.names)

    def _measure(self, artifact: Artifact, watch: Stopwatch) -> Measurement:
        with watch("measure"):
            return self._host.measure([self._known_reference(), artifact], self._inputs("validation"))[0]

    def _executed(self, artifact: Artifact, watch: Stopwatch) -> tuple[dict[str, str] | None, dict[str, str]]:
        """What ran in each layer, and what the runtime noticed."""
        with watch("read back"):
            found = self._host.executed(artifact, self._inputs("validation"))
            noticed = self._host.diagnose(artifact, self._inputs("validation"))
        return None if found is None else _by_layer(found, {layer.name for layer in self.structure.layers}), noticed

    def _latency_key(self, candidate: Candidate, role: Role) -> str:
        """Files of equal kernels share a latency; the vendor's file has kernels of its own.

        ONNX Runtime widens stored weights while it loads; in the other runtimes bits decide which kernel runs.
        """
        if role == "uniform-int8":
            return role
        return candidate.kernel_key if self._profile.runtime == "onnxruntime" else candidate.precision_key

    def _score(self, artifact: Artifact, latency: "_Latency", figures: Mapping[str, Any]) -> Score:
        if self._reference_ms is None:
            raise StageError("measure", "fp32 was not measured, there is nothing to relate a latency to")
        reasons = {"test_accuracy": NOT_IN_SEARCH, **figures["reasons"]}
        if latency.executed is None:
            reasons["executed"] = "the runtime does not tell"
        low, high = latency.ratio_ci
        return Score(
            accuracy=figures["accuracy"],
            latency_ms=latency.ratio * self._reference_ms,
            latency_ms_ci=(low * self._reference_ms, high * self._reference_ms),
            ratio=latency.ratio,
            ratio_ci=latency.ratio_ci,
            size_bytes=artifact.size_bytes,
            accuracy_ci=figures["accuracy_ci"],
            peak_memory_bytes=figures["peak_memory_bytes"],
            energy_mj=figures["energy_mj"],
            executed=latency.executed,
            diagnosis=latency.diagnosis,
            reasons=reasons,
        )

    def _known_reference(self) -> Artifact:
        if self._reference is None:
            raise StageError("measure", "fp32 was not built, there is nothing to compare with")
        return self._reference

    def _inputs(self, split: str) -> Path:
        """The folder of a split's inputs, written on first use."""
        folder = self._run.data / split
        if split not in self._written:
            self._task.write_split(split, folder)
            self._written.add(split)
        return folder

    def _relative(self, artifact: Artifact) -> Artifact:
        return dataclasses.replace(artifact, path=str(Path(artifact.path).relative_to(self._run.path)))

    def _artifact_of(self, trial: Trial) -> Artifact:
        assert trial.artifact is not None
        return dataclasses.replace(trial.artifact, path=str(self._run.path / trial.artifact.path))

    def _remember(self, trial: Trial) -> None:
        """Fill the caches from a trial of the record."""
        score = trial.score
        if score is None or trial.artifact is None:
            return
        if trial.role == "fp32" and trial.measurement is not None:
            self._reference, self._reference_ms = self._artifact_of(trial), trial.measurement.reference_ms
        reasons = {name: why for name, why in score.reasons.items() if name in ("accuracy", "accuracy_ci")}
        self._accuracy.setdefault(
            trial.artifact.key,
            {"accuracy": score.accuracy, "accuracy_ci": score.accuracy_ci, "reasons": reasons},
        )
        if trial.measurement is not None:
            self._latency.setdefault(
                self._latency_key(trial.candidate, trial.role),
                _Latency.of(trial.measurement, score.executed, score.diagnosis),
            )


def _by_layer(found: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """What ran, by layer of the original; of a layer that is two factors now both, where they differ."""
    by_layer: dict[str, list[str]] = {}
    for name, what in found.items():
        whole = name.rpartition(".")[0]
        layer = name if name in names else whole if whole in names else None
        if layer is not None:
            by_layer.setdefault(layer, []).append(what)
    return {layer: " and ".join(dict.fromkeys(ran)) for layer, ran in by_layer.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Latency:
    """What files of equal kernels share; `artifact` is the sha256 of the one that was measured."""

    artifact: str
    ratio: float
    ratio_ci: Interval
    executed: Mapping[str, str] | None
    diagnosis: Mapping[str, str]

    @classmethod
    def of(
        cls, measurement: Measurement, executed: Mapping[str, str] | None, diagnosis: Mapping[str, str]
    ) -> "_Latency":
        return cls(
            artifact=measurement.artifact_sha256,
            ratio=measurement.ratio,
            ratio_ci=measurement.ratio_ci,
            executed=executed,
            diagnosis=diagnosis,
        )

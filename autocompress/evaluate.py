"""One candidate → one Score or Failure: build the file, score it in its runtime, time it on its device."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.accuracies import Accuracies, Accuracy
from autocompress.build import Builder, Built, Stopwatch, exporter_of
from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError
from autocompress.core.front import Rival
from autocompress.core.measurement import Measurement
from autocompress.core.probe import paying
from autocompress.core.profile import Profile
from autocompress.core.recipe import Train
from autocompress.core.sensitivity import Sensitivity
from autocompress.core.space import Space, SpaceRules, Structure, with_stages_that_pay
from autocompress.core.trial import Failure, Role, Score, Trial
from autocompress.device.hosts import LOCAL, Host
from autocompress.device.lock import wait_until_quiet
from autocompress.device.timing import clock_name
from autocompress.finals import finalised
from autocompress.latencies import Latencies, Latency
from autocompress.meters import NOT_IN_SEARCH, read_meters
from autocompress.place import fitted
from autocompress.probe import payoff_of, subject_of
from autocompress.progress import Progress, Training

if TYPE_CHECKING:
    from autocompress.run import Run
    from autocompress.task import CheckedTask


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
        self._builder = Builder(task, run.path, profile, _told(progress, profile))
        self.structure: Structure = self._builder.structure
        space = rules.resolve(self.structure, profile, has_student=task.task.student is not None)
        space = dataclasses.replace(space, dropped={**lacking, **space.dropped})
        payoff = payoff_of(run, subject_of(task, self.structure, profile), facts)
        self.space: Space = with_stages_that_pay(space if payoff is None else paying(space, payoff))
        self._builder.allow(self.space.widths)
        self._with_memory = "memory" in run.config.objectives or run.config.limits.max_memory_mb is not None
        self._with_energy = "energy" in run.config.objectives
        self._written: set[str] = set()
        self._reference: Artifact | None = None
        self._reference_ms: float | None = None
        self._latencies = Latencies()
        self._accuracies = Accuracies(task, host, self._inputs)
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
            race = rivals if built.candidate.recipe.last_gate is None else ()
            latency_of = functools.partial(self._latency_of, watch=watch, measured=measured)
            early = latency_of(built.artifact, built.candidate, role) if race else None
            accuracy = self._accuracy_of(built.artifact, watch, early, race)
            if role == "candidate" and (why := self._against(built, accuracy.value)) is not None:
                built = self._builder.build(candidate, watch, fallback=True)
                built = dataclasses.replace(built, notes=(*built.notes, why))
                made[0], accuracy = built.artifact, self._accuracy_of(built.artifact, watch)
            candidate, notes = built.candidate, built.notes
            key = early or latency_of(made[0], candidate, role)
            if rivals and accuracy.items is None:
                again = functools.partial(self._measure, made[0], watch)
                if self._latencies.race(key, accuracy.value, rivals, again):
                    measured.append(self._latencies[key].measurement)
            latency = self._latencies[key]
            inputs = self._inputs("validation")
            memory, energy = self._with_memory, self._with_energy
            meters = read_meters(self._host, made[0], inputs, memory=memory, energy=energy, watch=watch)
            outcome = self._score(made[0], latency, accuracy, meters)
            latency_from = None if measured else latency.artifact
        except StageError as error:
            cause = error.__cause__ or error
            outcome = Failure(stage=error.stage, error=type(cause).__name__, message=str(error))
        return Trial(
            number=-1,
            role=role,
            candidate=candidate,
            outcome=outcome,
            artifact=self._relative(made[0]) if made else None,
            measurement=measured[-1] if measured else None,
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
        lost = 100 * (self._accuracies.known(self._known_reference()).value - accuracy)
        if lost <= stage.gate:
            return None
        return f"stage {stage.name!r} was undone: its file lost {lost:.2f} points, the limit is {stage.gate:g}"

    def finalise(self, trials: Sequence[Trial]) -> list[Trial]:
        """These trials measured again, round-robin in fresh processes, with test accuracy and peak memory.

        A model that fails now is dropped, and the log says so; fp32 must be among them.

        Raises:
            StageError: fp32 fails.
        """
        return finalised(
            trials,
            artifacts={t.number: self._artifact_of(t) for t in trials if t.score is not None},
            accuracies=self._accuracies,
            host=self._host,
            inputs=self._inputs("validation"),
            processes=self._profile.measure.processes,
            dropped=lambda number, why: self._run.log("dropped", number=number, message=why),
        )

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

    def _latency_of(
        self, artifact: Artifact, candidate: Candidate, role: Role, *, watch: Stopwatch, measured: list[Measurement]
    ) -> str:
        """The key of a file's latency, which is known then; `measured` has it where it was not before."""
        key = self._latency_key(candidate, role)
        if key not in self._latencies:
            measured.append(self._measure(artifact, watch))
            executed, diagnosis = self._executed(artifact, watch)
            if role == "fp32":
                self._reference_ms = measured[0].reference_ms
            self._latencies.take_up(key, Latency(parts=(measured[0],), executed=executed, diagnosis=diagnosis))
        return key

    def _accuracy_of(
        self, artifact: Artifact, watch: Stopwatch, key: str | None = None, rivals: Sequence[Rival] = ()
    ) -> Accuracy:
        """Accuracy of a file; with the key of its latency, no further than its rivals make it worth while."""
        interval = None if key is None else self._latencies[key].ratio_ci
        return self._accuracies.of(artifact, self._known_reference(), watch, ratio_ci=interval, rivals=rivals)

    def _score(self, artifact: Artifact, latency: Latency, accuracy: Accuracy, meters: Mapping[str, Any]) -> Score:
        if self._reference_ms is None:
            raise StageError("measure", "fp32 was not measured, there is nothing to relate a latency to")
        reasons = {"test_accuracy": NOT_IN_SEARCH, **accuracy.reasons, **meters["reasons"]}
        if latency.executed is None:
            reasons["executed"] = "the runtime does not tell"
        low, high = latency.ratio_ci
        return Score(
            accuracy=accuracy.value,
            items=accuracy.items,
            latency_ms=latency.ratio * self._reference_ms,
            latency_ms_ci=(low * self._reference_ms, high * self._reference_ms),
            ratio=latency.ratio,
            ratio_ci=latency.ratio_ci,
            size_bytes=artifact.size_bytes,
            accuracy_ci=accuracy.interval,
            peak_memory_bytes=meters["peak_memory_bytes"],
            energy_mj=meters["energy_mj"],
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
        known = Accuracy(value=score.accuracy, interval=score.accuracy_ci, items=score.items, reasons=reasons)
        self._accuracies.take_up(trial.artifact, known)
        if trial.measurement is not None:
            latency = Latency(parts=(trial.measurement,), executed=score.executed, diagnosis=score.diagnosis)
            self._latencies.take_up(self._latency_key(trial.candidate, trial.role), latency)


def _told(progress: Progress | None, profile: Profile) -> Callable[[str, int, int, float], None]:
    """What a training calls after each step. Wall time on this machine is not taken while something trains on it."""
    shown = Training(progress) if progress else lambda *_: None
    if profile.host != LOCAL or clock_name(profile.measure) != "wall":
        return shown

    def told(what: str, step: int, steps: int, loss: float) -> None:
        shown(what, step, steps, loss)
        wait_until_quiet()

    return told


def _by_layer(found: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """What ran, by layer of the original; of a layer that is two factors now both, where they differ."""
    by_layer: dict[str, list[str]] = {}
    for name, what in found.items():
        whole = name.rpartition(".")[0]
        layer = name if name in names else whole if whole in names else None
        if layer is not None:
            by_layer.setdefault(layer, []).append(what)
    return {layer: " and ".join(dict.fromkeys(ran)) for layer, ran in by_layer.items()}

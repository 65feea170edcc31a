import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.candidate import Candidate, LayerChoice, parse_precision
from autocompress.core.errors import StageError
from autocompress.core.front import Front, Limits
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.recipe import DEFAULT_STAGES, Quantize, Recipe, Stage
from autocompress.core.trial import Failure, Trial
from autocompress.device.local import LocalHost
from autocompress.evaluate import NOT_IN_SEARCH, Evaluator
from autocompress.optimize.study import Study
from autocompress.run import Run
from autocompress.task import CheckedTask
from tests import tiny
from tests.scripted import config

LAYERS = ("conv", "up", "fc")


class Recording:
    """The real host, and a list of what was asked of it: (job, sha256 of the last artifact)."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self.jobs: list[tuple[str, str]] = []
        self.reasons = host.reasons

    def measure(
        self, artifacts: list[Artifact], inputs: Path, *, fresh: bool = False, rows: tuple[int, ...] = (0,)
    ) -> list[Measurement]:
        self.jobs.append(("fresh" if fresh else "measure", artifacts[-1].sha256))
        return self._host.measure(artifacts, inputs, fresh=fresh, rows=rows)

    def outputs(self, artifact: Artifact, inputs: Path, out: Path) -> None:
        self.jobs.append((f"outputs {inputs.name}", artifact.sha256))
        self._host.outputs(artifact, inputs, out)

    def diagnose(self, artifact: Artifact, inputs: Path) -> dict[str, str]:
        return {"pieces": "1"}

    def executed(self, artifact: Artifact, inputs: Path) -> dict[str, str] | None:
        self.jobs.append(("executed", artifact.sha256))
        return self._host.executed(artifact, inputs)

    def peak_memory(self, artifact: Artifact, inputs: Path) -> int:
        self.jobs.append(("memory", artifact.sha256))
        return self._host.peak_memory(artifact, inputs)

    def energy(self, artifact: Artifact, inputs: Path) -> float | str:
        self.jobs.append(("energy", artifact.sha256))
        return self._host.energy(artifact, inputs)

    def fingerprint(self) -> Fingerprint:
        return self._host.fingerprint()

    def asked(self, act: Callable[[], Trial]) -> tuple[Trial, list[str]]:
        """What `act` gives, and which jobs it took."""
        before = len(self.jobs)
        trial = act()
        return trial, [job for job, _ in self.jobs[before:]]


@pytest.fixture(scope="module")
def host() -> Iterator[Recording]:
    with LocalHost(tiny.PROFILE) as real:
        yield Recording(real)


@pytest.fixture(scope="module")
def task() -> CheckedTask:
    return tiny.task(student=tiny.student)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.create(tmp_path_factory.mktemp("evaluate") / "run", config(profile=tiny.PROFILE, rules=tiny.RULES))


@pytest.fixture(scope="module")
def evaluator(task: CheckedTask, run: Run, host: Recording) -> Evaluator:
    return Evaluator(task, run, tiny.PROFILE, tiny.RULES, host)


@pytest.fixture(scope="module")
def early(evaluator: Evaluator) -> Trial:
    """A candidate before the baseline."""
    return evaluator.evaluate(quantized("w7a8"), "candidate")


@pytest.fixture(scope="module")
def fp32(evaluator: Evaluator, early: Trial) -> Trial:
    """The baseline, which every other evaluation needs."""
    return replace(evaluator.evaluate(Candidate(), "fp32"), number=0)


def quantized(precision: str, recipe: Recipe = Recipe()) -> Candidate:  # noqa: B008
    return Candidate(layers={name: parse_precision(precision) for name in LAYERS}, recipe=recipe)


def logged(run: Run, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_fp32_is_what_the_model_is(fp32: Trial, run: Run) -> None:
    score = fp32.score
    assert score is not None
    assert score.accuracy == 1.0  # it labelled the items itself
    assert score.accuracy_ci == (1.0, 1.0)
    assert score.ratio_ci[0] <= 1.0 <= score.ratio_ci[1] or score.ratio == pytest.approx(1.0, rel=0.3)
    assert fp32.measurement is not None
    assert score.latency_ms == pytest.approx(score.ratio * fp32.measurement.reference_ms)
    assert score.executed == dict.fromkeys(LAYERS, "fp32")
    assert fp32.artifact is not None
    path = run.path / fp32.artifact.path
    assert not Path(fp32.artifact.path).is_absolute()
    assert (sha256_of(path), path.stat().st_size) == (fp32.artifact.sha256, score.size_bytes)


def test_what_a_search_does_not_measure_is_null_with_a_reason(fp32: Trial) -> None:
    score = fp32.score
    assert score is not None
    for name in ("test_accuracy", "peak_memory_bytes", "energy_mj"):
        assert getattr(score, name) is None
        assert score.reasons[name].startswith(NOT_IN_SEARCH)


def test_a_candidate_is_scored_on_its_file_in_its_runtime(evaluator: Evaluator, fp32: Trial, run: Run) -> None:
    trial = evaluator.evaluate(quantized("w7a8"), "candidate")
    score = trial.score
    assert score is not None
    assert fp32.score is not None
    assert fp32.measurement is not None
    assert trial.artifact is not None
    assert 0.8 <= score.accuracy <= 1.0
    assert score.accuracy_ci is not None
    assert score.accuracy_ci[0] <= score.accuracy <= score.accuracy_ci[1]
    assert set((score.executed or {}).values()) == {"int8"}
    assert score.size_bytes < fp32.score.size_bytes
    assert score.latency_ms == pytest.approx(score.ratio * fp32.measurement.reference_ms)
    assert score.latency_ms_ci == pytest.approx(tuple(r * fp32.measurement.reference_ms for r in score.ratio_ci))
    assert {"export", "score", "measure", "read back"} <= trial.seconds.keys()


def test_files_of_equal_kernels_share_one_measurement(evaluator: Evaluator, fp32: Trial, host: Recording) -> None:
    first = evaluator.evaluate(quantized("w7a8", Recipe(calibrator="percentile")), "candidate")
    known = first.latency_from or (first.artifact.sha256 if first.artifact else "")
    second, jobs = host.asked(lambda: evaluator.evaluate(quantized("w4a8"), "candidate"))
    assert jobs == ["outputs validation"]
    assert second.measurement is None
    assert second.latency_from == known
    assert first.score is not None
    assert second.score is not None
    assert (second.score.ratio, second.score.ratio_ci) == (first.score.ratio, first.score.ratio_ci)
    assert second.score.size_bytes < first.score.size_bytes
    assert second.score.accuracy != first.score.accuracy or second.artifact != first.artifact


def test_other_kernels_are_measured(evaluator: Evaluator, fp32: Trial, host: Recording) -> None:
    candidate = Candidate(layers={"conv": parse_precision("w7a8")})
    trial, jobs = host.asked(lambda: evaluator.evaluate(candidate, "candidate"))
    assert jobs == ["outputs validation", "measure", "executed"]
    assert trial.latency_from is None
    assert trial.score is not None
    assert trial.score.executed == {"conv": "int8", "up": "fp32", "fc": "fp32"}


def test_equal_bytes_are_not_scored_again(evaluator: Evaluator, fp32: Trial, host: Recording) -> None:
    again, jobs = host.asked(lambda: evaluator.evaluate(Candidate(recipe=Recipe(calibrator="mse")), "candidate"))
    assert jobs == []
    assert again.score is not None
    assert fp32.score is not None
    assert again.artifact is not None
    assert fp32.artifact is not None
    assert again.artifact.sha256 == fp32.artifact.sha256
    assert (again.score.accuracy, again.score.ratio) == (fp32.score.accuracy, fp32.score.ratio)


def test_uniform_int8_is_the_vendors_file_with_a_latency_of_its_own(
    evaluator: Evaluator, fp32: Trial, host: Recording
) -> None:
    candidate = evaluator.space.decode(evaluator.space.uniform("w8a8"))
    trial, jobs = host.asked(lambda: evaluator.evaluate(candidate, "uniform-int8"))
    assert "measure" in jobs
    assert trial.score is not None
    assert trial.artifact is not None
    assert trial.artifact.path == "artifacts/uniform-int8.onnx"
    assert trial.score.accuracy > 0.6


def test_the_space_is_that_of_model_and_machine(evaluator: Evaluator, host: Recording, run: Run) -> None:
    variables = evaluator.space.variables
    assert variables["width:conv"] == (8, 4)
    assert variables["width:up"] == (24, 12)
    assert variables["student"] == (0.0, 0.5, 0.25, 0.125)
    vnni = "vnni" in host.fingerprint().facts.get("flags", "")
    if host.fingerprint().facts["arch"] == "x86_64" and not vnni:
        assert "w8a8" not in variables["precision:conv"]
    (model,) = logged(run, "model")[:1]
    assert model["layers"] == 3
    assert model["left_alone"] == evaluator.structure.left_alone


@pytest.mark.parametrize(
    ("candidate", "stage", "message"),
    [
        (Candidate(student=0.25), "score", "the metric raises ValueError: these are no logits"),
        (Candidate(widths={"conv": 5, "nothing": 4}), "compress", "there is no channel group 'nothing'"),
    ],
)
def test_a_candidates_fault_is_a_value_and_the_search_goes_on(
    evaluator: Evaluator, fp32: Trial, candidate: Candidate, stage: str, message: str
) -> None:
    trial = evaluator.evaluate(candidate, "candidate")
    assert isinstance(trial.outcome, Failure)
    assert trial.outcome.stage == stage
    assert message in trial.outcome.message
    assert (trial.artifact is None) == (stage != "score")
    assert evaluator.evaluate(quantized("w7a8"), "candidate").score is not None


def test_a_student_is_smaller_and_scored(evaluator: Evaluator, fp32: Trial) -> None:
    trial = evaluator.evaluate(Candidate(student=0.5), "candidate")
    assert trial.score is not None
    assert fp32.score is not None
    assert trial.score.size_bytes < 0.8 * fp32.score.size_bytes
    assert trial.score.accuracy < 1.0
    assert trial.measurement is not None


def test_nothing_is_scored_before_fp32(early: Trial) -> None:
    assert isinstance(early.outcome, Failure)
    assert "fp32 was not built, there is nothing to compare with" in early.outcome.message


def test_the_front_is_finished_with_test_accuracy_and_memory_in_fresh_processes(
    evaluator: Evaluator, fp32: Trial, host: Recording, task: CheckedTask, run: Run
) -> None:
    held_out = task.task.test
    assert isinstance(held_out, tiny.Images)
    candidate = replace(evaluator.evaluate(quantized("w7a8"), "candidate"), number=1)
    broken = replace(evaluator.evaluate(Candidate(widths={"up": 12}), "candidate"), number=2)
    failed = replace(evaluator.evaluate(Candidate(widths={"nothing": 4}), "candidate"), number=3)
    assert broken.artifact is not None
    (run.path / broken.artifact.path).write_bytes(b"cut off")
    before = held_out.reads
    assert not any(job.endswith(" test") for job, _ in host.jobs)
    assert not (run.data / "test").exists()

    final = evaluator.finalise([fp32, candidate, broken, failed])

    assert [t.number for t in final] == [0, 1]
    (dropped,) = logged(run, "dropped")
    assert dropped["number"] == 2
    assert held_out.reads == before + len(held_out)
    for trial in final:
        score, measurement = trial.score, trial.measurement
        assert score is not None
        assert measurement is not None
        assert set(measurement.processes) == {0, 1}
        assert score.ratio == measurement.ratio
        assert score.peak_memory_bytes is not None
        assert score.peak_memory_bytes > 0
        assert score.test_accuracy is not None
        assert trial.latency_from is None
        assert score.energy_mj is not None or score.reasons["energy_mj"]
        assert "test_accuracy" not in score.reasons
    assert final[0].score is not None
    assert final[0].score.test_accuracy == 1.0
    assert {t.number for t in Front.of(final).points} <= {0, 1}


def test_fp32_that_fails_at_the_end_is_raised(evaluator: Evaluator, fp32: Trial, run: Run, tmp_path: Path) -> None:
    assert fp32.artifact is not None
    gone = replace(fp32, artifact=replace(fp32.artifact, path="artifacts/gone.onnx"))
    with pytest.raises(StageError, match=r"gone\.onnx"):
        evaluator.finalise([gone])


def test_a_resumed_search_measures_and_scores_nothing_that_is_in_the_record(
    evaluator: Evaluator, fp32: Trial, run: Run, host: Recording
) -> None:
    values = evaluator.space.uniform("w8a8")
    trial = evaluator.evaluate(evaluator.space.decode(values), "candidate")
    if trial.measurement is None:  # measured by a test before: the record must hold the raw samples
        key = trial.candidate.kernel_key
        evaluator._latencies._known.pop(key)
        trial = evaluator.evaluate(trial.candidate, "candidate")
    with Study(
        run.storage, run.config.study, run.config.objectives, evaluator.space.variables,
        seed=0, digest=lambda v: evaluator.space.decode(v).digest,
    ) as study:  # fmt: skip
        study.tell(fp32, evaluator.space.uniform("fp32"), {})
        study.tell(trial, values, {})
    limited = replace(run, config=replace(run.config, limits=Limits(max_memory_mb=500)))
    resumed = Evaluator(tiny.task(test=None), limited, tiny.PROFILE, tiny.RULES, host)
    again, jobs = host.asked(lambda: resumed.evaluate(trial.candidate, "candidate"))
    assert jobs == ["memory"]  # which the limit asks for, and the record does not have
    assert again.score is not None
    assert trial.score is not None
    assert (again.score.accuracy, again.score.accuracy_ci) == (trial.score.accuracy, trial.score.accuracy_ci)
    assert again.score.ratio == pytest.approx(trial.score.ratio)
    assert again.score.peak_memory_bytes is not None
    assert "peak_memory_bytes" not in again.score.reasons
    other, jobs = host.asked(
        lambda: resumed.evaluate(Candidate(layers={"fc": LayerChoice(weight_bits=4)}), "candidate")
    )
    assert jobs == ["outputs validation", "outputs validation", "memory"]  # fp32's outputs once more, for the interval
    assert other.score is not None
    assert math.isfinite(other.score.accuracy)
    assert np.isfinite(other.score.ratio_ci).all()
    (final,) = resumed.finalise([fp32])
    assert final.score is not None
    assert final.score.test_accuracy is None
    assert final.score.reasons["test_accuracy"] == "the task has no test split"


def test_a_file_that_fails_the_gate_of_its_bits_is_made_again_in_float(evaluator: Evaluator, fp32: Trial) -> None:
    def gated(limit: float) -> Trial:
        stages = (*DEFAULT_STAGES, Stage(name="bits", quantize=Quantize(), gate=limit))
        candidate = replace(quantized("w2a8"), recipe=Recipe(stages=stages))
        return evaluator.evaluate(candidate, "candidate")

    kept, undone = gated(100.0), gated(0.0)
    assert kept.candidate.has_bits
    assert kept.notes == ()
    assert not undone.candidate.has_bits
    assert "stage 'bits' was undone: its file lost" in undone.notes[0]
    assert "the limit is 0" in undone.notes[0]
    assert undone.score is not None
    assert fp32.score is not None
    assert undone.score.accuracy == fp32.score.accuracy

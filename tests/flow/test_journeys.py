"""The whole journey on models of different kinds: search, front, pick, verify, re-profile, all by the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from autocompress.cli import main
from tests import made

TASKS = Path(__file__).resolve().parents[1] / "data" / "tasks"
JOURNEYS = {
    "depthwise": ["--fidelity", "recover", "--recover-steps", "20"],
    "conv1d": [],
    "mlp": ["--space", "prune-and-quantize", "--objectives", "accuracy,latency,size"],
    "transformer": ["--space", "transformer"],
}
TRIALS = 9


@pytest.fixture(scope="module", params=JOURNEYS)
def journey(
    request: pytest.FixtureRequest, quick_profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A task's name and its finished run."""
    name: str = request.param
    run = tmp_path_factory.mktemp(name) / "run"
    task, trials = str(TASKS / f"{name}.py"), str(TRIALS)
    command = ["search", task, "--target", str(quick_profile), "--trials", trials, "--out", str(run)]
    assert main([*command, *JOURNEYS[name]]) == 0
    return name, run


def _json(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    # A package that was measured for a fraction of a second may miss its latency on a busy machine.
    assert main([*command, "--json"]) in ((0, 1) if command[0] == "verify" else (0,))
    return json.loads(capsys.readouterr().out)


def test_a_front_of_files(journey: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = journey
    front = _json(capsys, "front", str(run))
    assert set(front["baselines"]) == {"fp32", "uniform-int8"}
    assert front["points"]
    for point in front["points"]:
        assert (run / point["artifact"]["path"]).stat().st_size == point["size_bytes"]
        low, high = point["latency_ms_ci"]
        assert low <= point["latency_ms"] <= high
        assert point["test_accuracy"] is not None
        assert point["peak_memory_bytes"] > 0


def test_inputs_keep_the_tasks_names_and_order(journey: tuple[str, Path]) -> None:
    import onnxruntime as ort

    from autocompress.task import check_task, load_task

    name, run = journey
    task = check_task(load_task(str(TASKS / f"{name}.py")))
    for file in sorted((run / "artifacts").glob("*.onnx"))[:3]:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert tuple(value.name for value in session.get_inputs()) == task.names
        assert tuple(value.name for value in session.get_outputs()) == task.outputs.names


def test_no_candidate_fails_and_what_ran_is_what_was_asked(journey: tuple[str, Path]) -> None:
    from autocompress.run import open_run

    trials = open_run(journey[1]).trials()
    assert len(trials) >= TRIALS
    for trial in trials:
        assert trial.score is not None, trial.outcome
        if trial.role == "uniform-int8" or trial.score.executed is None:
            continue
        for layer, ran in trial.score.executed.items():
            asked = trial.candidate.layers[layer].kernel if layer in trial.candidate.layers else "float"
            assert (ran == "int8") == (asked == "int8"), (layer, ran, asked)


def test_the_picked_package_verifies_and_predicts(
    journey: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = journey
    package = tmp_path / "package"
    assert main(["pick", str(run), "--knee", "--out", str(package)]) == 0
    assert made.but_latency(_json(capsys, "verify", str(package))["faults"]) == []
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["schema"] == 1
    changed = _json(capsys, "reprofile", str(package))
    assert changed["schema"] == 1


def test_a_run_is_reprofiled(journey: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = journey
    points = _json(capsys, "front", str(run))["points"]
    before = {number for point in points for number in (point["trial"], *point.get("ties", ()))}
    changed = _json(capsys, "reprofile", str(run))
    assert before <= {point["trial"] for point in changed["points"]}
    assert changed["machine"] == {}
    assert set(changed["left"]) <= before

"""`front --json` has the schema that others script against."""

from pathlib import Path

from autocompress.core.trial import Failure
from autocompress.report.document import front_json
from tests import made

KEYS = {
    "trial", "accuracy", "accuracy_ci", "test_accuracy", "latency_ms", "latency_ms_ci", "speedup_vs_fp32",
    "size_bytes", "peak_memory_bytes", "energy_mj", "front_probability", "candidate", "artifact",
}  # fmt: skip


def test_schema_1(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    found = front_json(run, run.front(), made.trials())
    assert list(found) == ["schema", "task", "target", "fingerprint", "objectives", "baselines", "points"]
    assert (found["schema"], found["task"], found["target"]) == (1, "scripted", "scripted")
    assert found["fingerprint"] == "Test CPU, 2, Test OS, onnxruntime 1"
    assert found["objectives"] == ["accuracy", "latency"]
    assert set(found["baselines"]) == {"fp32", "uniform-int8"}
    for point in (*found["points"], *found["baselines"].values()):
        assert set(point) >= KEYS
        nulls = {key for key in KEYS if point[key] is None}
        assert {key if key != "energy_mj" else "energy" for key in nulls} <= {k.removesuffix("_reason") for k in point}
        assert not Path(point["artifact"]["path"]).is_absolute()


def test_points_come_fastest_first(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    points = front_json(run, run.front(), made.trials())["points"]
    assert [p["trial"] for p in points] == [3, 2, 1, 0]
    assert points[1]["speedup_vs_fp32"] == 2.5


def test_a_baseline_without_a_score_is_null_with_its_reason(tmp_path: Path) -> None:
    failed = made.trial(1, Failure(stage="export", error="E", message="no such op"), "uniform-int8")
    trials = [made.trials()[0], failed]
    run = made.run(tmp_path / "run", trials)
    found = front_json(run, run.front(), trials)["baselines"]
    assert found["uniform-int8"] is None
    assert found["uniform-int8_reason"] == "trial 1 failed in export: no such op"


def test_a_run_without_trials_has_no_fingerprint_and_says_why(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", [])
    found = front_json(run, run.front(), [])
    assert found["fingerprint"] is None
    assert found["fingerprint_reason"] == "nothing was measured yet"
    assert found["points"] == []

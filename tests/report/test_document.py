"""`front --json` has the schema that others script against."""

import dataclasses
from pathlib import Path

from autocompress.core.front import Front
from autocompress.core.trial import Failure
from autocompress.report.document import front_json
from tests import made

KEYS = {
    "trial", "accuracy", "accuracy_ci", "test_accuracy", "latency_ms", "latency_ms_ci", "speedup_vs_fp32",
    "size_bytes", "peak_memory_bytes", "energy_mj", "front_probability", "executed_differs",
    "candidate", "artifact",
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


def test_half_precision_is_a_baseline_where_it_was_tried(tmp_path: Path) -> None:
    half = made.trial(5, made.score(0.95, 0.7), "uniform-bf16")
    failed = made.trial(6, Failure(stage="load", error="E", message="no fp16 here"), "uniform-fp16")
    trials = [*made.trials(), half, failed]
    run = made.run(tmp_path / "run", trials)
    found = front_json(run, run.front(), trials)["baselines"]
    assert list(found) == ["fp32", "uniform-fp16", "uniform-fp16_reason", "uniform-bf16", "uniform-int8"]
    assert found["uniform-bf16"]["trial"] == 5
    assert found["uniform-fp16_reason"] == "trial 6 failed in load: no fp16 here"


def test_what_ran_otherwise_is_told_or_why_not(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    points = {p["trial"]: p for p in front_json(run, run.front(), made.trials())["points"]}
    assert points[3]["executed_differs"] == {"conv": "fp32"}
    assert points[2]["executed_differs"] == {}
    found = made.trials()
    unread = dataclasses.replace(made.score(0.9, 0.1), executed=None, reasons=made.REASONS | {"executed": "not told"})
    found.append(dataclasses.replace(found[2], number=7, outcome=unread))
    point = front_json(run, Front.of(found), found)["points"][0]
    assert (point["executed_differs"], point["executed_differs_reason"]) == (None, "not told")

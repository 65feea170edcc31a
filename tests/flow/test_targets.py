"""The same tasks on every runtime of this machine: a front each, scored in that runtime, and what ran is told."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from autocompress import search
from autocompress.config import load_profile
from autocompress.device.runtime import get_runtime
from autocompress.pack import write_package
from autocompress.run import Run, open_run
from autocompress.task import check_task, load_task
from tests.test_package import predicts

TASKS = Path(__file__).resolve().parents[1] / "data" / "tasks"
TARGETS = ("cpu-onnxruntime", "cpu-openvino", "cpu-litert")
NAMES = ("digits", "depthwise", "conv1d", "mlp", "transformer")
TRIALS = 4
# The four files run on ONNX Runtime in test_journeys, with all that comes after a search.
CASES = [(target, name) for target in TARGETS for name in NAMES if target != "cpu-onnxruntime" or name == "digits"]


class Case(NamedTuple):
    target: str
    task: str
    run: Run


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    target, name = request.param
    profile = load_profile(target)
    measure = replace(profile.measure, warmup_s=0.005, min_blocks=3, max_duration_s=0.1, processes=1)
    task = name if name == "digits" else str(TASKS / f"{name}.py")
    space = "transformer" if name == "transformer" else "default"
    out = tmp_path_factory.mktemp("targets") / "run"
    run = search(task, replace(profile, measure=measure), space=space, trials=TRIALS, out=out)
    return Case(target, task, run)


def test_there_is_a_front_with_both_baselines(case: Case) -> None:
    front = open_run(case.run.path).front()
    assert {"fp32", "uniform-int8"} <= set(front.baselines)
    assert front.points
    assert all(trial.score is not None for trial in case.run.trials()), [t.outcome for t in case.run.trials()]


def test_the_fp32_file_is_as_accurate_as_in_torch(case: Case) -> None:
    task = check_task(load_task(case.task))
    import torch

    with torch.no_grad():
        inputs, _ = task.batch("validation", range(len(task.split("validation"))))
        outputs = task.unflatten({k: v.numpy() for k, v in task.flatten_outputs(task.call(task.model, inputs)).items()})
    wanted = task.metric(outputs, task.targets("validation"))
    fp32 = case.run.front().baselines["fp32"].score
    assert fp32 is not None
    assert fp32.accuracy == pytest.approx(wanted, abs=0.005)


def test_what_ran_is_what_was_asked_or_is_shown(case: Case) -> None:
    for trial in case.run.trials():
        score = trial.score
        assert score is not None
        assert score.executed, score.reasons
        assert trial.executed_differs == {}


def test_files_load_in_their_runtime_with_the_tasks_names(case: Case) -> None:
    task = check_task(load_task(case.task))
    profile = load_profile(case.target)
    trial = case.run.front().points[0]
    assert trial.artifact is not None
    options = {**profile.options, **trial.artifact.options, "threads": 1}
    session = get_runtime(profile.runtime).load(case.run.path / trial.artifact.path, options)
    types = {spec.name: spec.dtype for spec in trial.artifact.inputs}
    item = {name: tensor.numpy().astype(types[name]) for name, tensor in task.batch("validation", range(1))[0].items()}
    assert tuple(session.run(item)) == task.outputs.names
    session.close()


def test_a_package_predicts_with_its_runtime_alone(case: Case, tmp_path: Path) -> None:
    package = write_package(case.run, case.run.front().points[0], tmp_path / "package")
    predicts(package, tmp_path / "out.npz")

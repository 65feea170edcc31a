"""Properties of a run directory."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.candidate import Candidate
from autocompress.core.errors import NoPointError, RunError
from autocompress.core.trial import Trial
from autocompress.optimize.study import Study
from autocompress.run import Run, open_run
from tests import scripted

GOLDEN = Path(__file__).parent / "data" / "run-1"


def add(run: Run, *policies: tuple[str, float]) -> None:
    """Finished trials for uniform policies; the first one is the fp32 baseline."""
    space = scripted.space()
    with Study(
        run.storage,
        run.config.study,
        run.config.objectives,
        space.variables,
        digest=lambda v: space.decode(v).digest,
        seed=0,
    ) as study:
        for precision, ratio in policies:
            values = space.uniform(precision, ratio)
            candidate = space.decode(values)
            role = "fp32" if candidate == Candidate() else "candidate"
            trial = Trial(number=-1, role=role, candidate=candidate, outcome=scripted.score(candidate))
            study.tell(trial, values, {})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", scripted.config())


def test_the_config_comes_back(run: Run) -> None:
    assert open_run(run.path) == run
    assert json.loads((run.path / "run.json").read_text())["schema"] == 1


def test_a_run_is_not_made_over_something_else(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a run already: continue it with --resume"):
        Run.create(run.path, scripted.config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="full is not empty: a run needs a directory of its own"):
        Run.create(tmp_path / "full", scripted.config())
    with pytest.raises(RunError, match=r"cannot make a run at .*: Not a directory"):
        Run.create(tmp_path / "full" / "thesis.txt" / "run", scripted.config())


def test_what_is_no_run_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing is no run: there is no such directory$"):
        open_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty is no run: it has no run\.json$"):
        open_run(tmp_path / "empty")
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"is no run: its run\.json is not JSON"):
        open_run(run.path)


def test_a_newer_run_is_refused(run: Run) -> None:
    path = run.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(RunError, match="has schema 2, newer than the 1 known here: upgrade autocompress"):
        open_run(run.path)


def test_a_run_without_trials_has_an_empty_front(run: Run) -> None:
    """And reading it leaves no database behind."""
    assert run.trials() == []
    with pytest.raises(NoPointError, match="the front is empty"):
        run.front().pick()
    assert not (run.path / "study.db").exists()


def test_the_front_is_there_while_the_search_goes_on(run: Run) -> None:
    add(run, ("fp32", 1.0), ("w8a8", 1.0), ("w8a8", 0.5), ("fp32", 0.5))
    front = run.front()
    assert [t.number for t in front.points] == [2, 1, 0]
    assert front.pick(max_accuracy_drop=10).number == 1
    assert set(front.baselines) == {"fp32"}


def test_the_final_front_counts_until_there_are_new_trials(run: Run) -> None:
    """Measured again it replaces the front of the search; one trial more and it is out of date."""
    add(run, ("fp32", 1.0), ("w8a8", 1.0))
    assert run.final() is None
    again = [replace(t, outcome=replace(t.score, test_accuracy=0.5)) for t in run.trials() if t.score]
    run.write_final(again)
    assert run.final() == again
    assert [t.score.test_accuracy for t in run.front().points if t.score] == [0.5, 0.5]
    add(run, ("w8a8", 0.5))
    assert run.final() is None
    assert [t.score.test_accuracy for t in run.front().points if t.score] == [None, None, None]


def test_a_run_can_be_moved(run: Run, tmp_path: Path) -> None:
    """Also to a path with the braces that Optuna would fill in."""
    add(run, ("fp32", 1.0))
    shutil.move(run.path, tmp_path / "a {new} place")
    assert len(open_run(tmp_path / "a {new} place").trials()) == 1


def test_the_log_keeps_whole_lines_from_several_processes(run: Run) -> None:
    code = (
        "import sys; from autocompress.run import open_run; run = open_run(sys.argv[1])\n"
        "for i in range(200): run.log('trial', number=i, text='x' * 3000)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(run.path)]) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 400
    assert {line["process"] for line in lines} == {p.pid for p in processes}
    assert all(line["event"] == "trial" and line["time"].endswith("+00:00") for line in lines)


def test_a_run_in_use_names_the_process_and_is_free_after_kill(run: Run) -> None:
    code = (
        "import sys, time; from autocompress.run import open_run\n"
        "with open_run(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        with pytest.raises(RunError, match=f"is in use by process {process.pid}: wait for it or stop it"), run.lock():
            pass
        process.kill()
        process.wait()
    with run.lock():
        assert (run.path / "lock").read_text() == str(os.getpid())


def test_reading_a_run_imports_no_torch(run: Run) -> None:
    add(run, ("fp32", 1.0))
    code = (
        "import sys; from autocompress.run import open_run; run = open_run(sys.argv[1])\n"
        "assert 'optuna' not in sys.modules\n"
        "assert len(run.front().points) == 1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)


def test_a_run_of_version_0_1_still_opens(tmp_path: Path) -> None:
    """run.json, study.db and final.json as the first version wrote them, 12 trials, one failed."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.config == scripted.config(trials=12)
    trials = run.trials()
    assert [t.number for t in trials] == list(range(12))
    assert [t.role for t in trials[:3]] == ["fp32", "uniform-int8", "candidate"]
    assert [t.number for t in trials if t.score is None] == [5]
    assert all(t.score == scripted.score(t.candidate) for t in trials if t.score)
    assert trials[2].score is not None
    assert trials[2].measurement == scripted.measurement(trials[2].score.ratio)
    assert run.final() is not None
    assert set(run.front().baselines) == {"fp32", "uniform-int8"}
    scripted.drive(run, scripted.Scripted(run), trials=14)
    assert len(run.trials()) == 14


def test_opening_is_quick(run: Run) -> None:
    """A second is what a person waits for without asking: interpreter, Optuna and database included."""
    add(run, ("fp32", 1.0), ("w8a8", 1.0))
    begin = time.process_time()
    for _ in range(3):
        run.front()
    assert (time.process_time() - begin) / 3 < 1.0

"""Properties of a search, with candidates scored by a formula: real studies, runs, processes and signals."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autocompress.begin import seeds
from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError, RunError, StageError, TargetError
from autocompress.core.front import Limits, Rival
from autocompress.core.trial import Failure, Role, Trial
from autocompress.driver import _resumed, conduct, contribute, search, worker
from autocompress.loop import Budget
from autocompress.optimize.nsga2 import generation_key
from autocompress.progress import Lines, Silent, Status
from autocompress.run import Run, open_run
from autocompress.signals import Interrupted, Signals
from tests import scripted

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", scripted.config())


def events(run: Run, name: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if name in (None, line["event"])]


def evaluated(run: Run) -> list[str]:
    """Digests of the candidates that any process evaluated, baselines left out."""
    lines = (run.path / "evaluated.txt").read_text().splitlines()
    return [line.split()[1] for line in lines if line.startswith("candidate ")]


def generations(run: Run) -> list[int | None]:
    study = optuna.load_study(study_name="scripted", storage=run.storage)
    return [t.system_attrs.get(generation_key()) for t in study.trials]


def start(run: Run, *options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "tests.scripted", str(run.path), *options], cwd=ROOT)


def wait_for(run: Run, trials: int) -> None:
    deadline = time.monotonic() + 60
    while len(run.trials()) < trials:
        assert time.monotonic() < deadline, "no trials were written"
        time.sleep(0.05)


class Watching(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Trial, Status]] = []

    def trial(self, trial: Trial, status: Status) -> None:
        self.told.append((trial, status))


def test_baselines_come_first_then_our_own_int8_then_uniform_policies(run: Run) -> None:
    scripted.drive(run, scripted.Scripted(run), trials=12)
    trials, space = run.trials(), scripted.space()
    assert [t.role for t in trials[:3]] == ["fp32", "uniform-int8", "candidate"]
    assert trials[0].candidate == Candidate()
    assert trials[1].candidate == trials[2].candidate == space.decode(space.uniform("w8a8"))
    policies = [space.decode(values).digest for values in seeds(space)]
    assert {t.candidate.digest for t in trials[2:]} <= set(policies)


def test_seeds_are_every_precision_at_every_width_once() -> None:
    found = seeds(scripted.space())
    assert found[0] == scripted.space().uniform("w8a8")
    assert len(found) == len({tuple(sorted(v.items())) for v in found}) == 3 * 4


def test_the_budget_counts_the_record_and_nothing_is_evaluated_twice(run: Run) -> None:
    scripted.drive(run, scripted.Scripted(run), trials=40)
    assert [t.number for t in run.trials()] == list(range(40))
    found = evaluated(run)
    assert len(found) == len(set(found)) == 38


def test_a_time_budget_ends_after_the_trial_that_is_running(run: Run) -> None:
    evaluator = scripted.Scripted(run, sleep=0.1)
    budget = Budget(deadline=time.monotonic() + 4.0)
    begin = time.monotonic()
    conduct(evaluator, run, budget=budget, progress=Silent(), signals=Signals())
    assert time.monotonic() - begin < 10
    assert 3 <= len(run.trials()) <= 41
    assert events(run, "run_ended")[0]["reason"] == "time"


def test_a_space_that_is_used_up_ends_the_search(run: Run) -> None:
    rules = replace(scripted.RULES, widths=(), precision_by="model")
    scripted.drive(run, scripted.Scripted(run, space=scripted.space(2, rules)), trials=None)
    assert len(run.trials()) == 2 + 2
    assert events(run, "run_ended")[0]["reason"] == "space exhausted"


def test_failures_are_kept_and_the_search_goes_on(run: Run) -> None:
    def narrow(candidate: Candidate) -> bool:
        return candidate.widths.get("conv0", 32) == 8

    scripted.drive(run, scripted.Scripted(run, fails=narrow), trials=40)
    failed = [t for t in run.trials() if isinstance(t.outcome, Failure)]
    assert failed
    assert all(narrow(t.candidate) for t in failed)
    assert len(run.trials()) == 40
    logged = events(run, "failure")
    assert [e["number"] for e in logged] == [t.number for t in failed]
    assert {(e["stage"], e["message"]) for e in logged} == {("load", "no kernel")}


def test_a_front_measured_again_is_the_front_of_the_run(run: Run) -> None:
    evaluator = scripted.Scripted(run)
    scripted.drive(run, evaluator, trials=30)
    (chosen,) = evaluator.finalised
    assert {0, 1} <= set(chosen)
    by_number = {t.number: t for t in run.trials()}
    for point in run.front().points:
        assert point.number in chosen
        before = by_number[point.number].score
        assert point.score is not None
        assert before is not None
        assert point.score.accuracy == before.accuracy + 0.005


def test_a_front_that_cannot_be_measured_again_stands_as_found(run: Run) -> None:
    class Broken(scripted.Scripted):
        def finalise(self, trials: Sequence[Trial]) -> list[Trial]:
            raise StageError("measure", "the device went away")

    scripted.drive(run, Broken(run), trials=8)
    assert run.final() is None
    assert run.front().points
    assert events(run, "not_finalised")[0]["message"] == "the device went away"


def test_resuming_goes_on_with_numbers_generations_and_a_new_final_front(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", scripted.config(sampler="nsga2"))
    scripted.drive(run, scripted.Scripted(run), trials=20)
    again = scripted.Scripted(run)
    scripted.drive(run, again, trials=60)
    assert [t.number for t in run.trials()] == list(range(60))
    assert "fp32" not in [t.role for t in run.trials()[2:]]
    assert len(again.evaluated) == 40
    found = [g for g in generations(run) if g is not None]
    assert found == sorted(found)
    assert found[-1] == 59 // 16
    assert len(again.finalised) == 1
    assert run.final() is not None


def test_resuming_a_finished_run_measures_nothing(run: Run) -> None:
    scripted.drive(run, scripted.Scripted(run), trials=10)
    again = scripted.Scripted(run)
    scripted.drive(run, again, trials=10)
    assert (again.evaluated, again.finalised) == ([], [])


def test_nothing_finished_is_lost_by_kill_9(run: Run) -> None:
    """Every trial that was told is there, whole; none looks as if it still ran; the search resumes."""
    process = start(run, "--trials", "1000", "--sleep", "0.02")
    wait_for(run, 12)
    process.kill()
    process.wait()
    kept = run.trials()
    assert [t.number for t in kept] == list(range(len(kept)))
    assert len(evaluated(run)) - len([t for t in kept if t.role == "candidate"]) in (0, 1)
    states = {t.state for t in optuna.load_study(study_name="scripted", storage=run.storage).trials}
    assert states == {optuna.trial.TrialState.COMPLETE}
    assert run.front().points
    scripted.drive(run, scripted.Scripted(run), trials=len(kept) + 5)
    assert run.trials()[: len(kept)] == kept
    assert [t.number for t in run.trials()] == list(range(len(kept) + 5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_abandons_the_evaluation_and_keeps_the_rest(run: Run, number: signal.Signals) -> None:
    process = start(run, "--trials", "1000", "--sleep", "0.3")
    wait_for(run, 4)
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait() == 130
    assert time.monotonic() - begin < 5
    assert len(run.trials()) >= 4
    assert run.front().points
    (ended,) = events(run, "run_ended")
    assert ended["reason"] == f"stopped by {number.name}; the front was not measured again"
    with run.lock():
        pass


def test_a_second_signal_ends_the_process_at_once(run: Run) -> None:
    code = (
        "import time; from autocompress.signals import Interrupted, Signals\n"
        "with Signals().installed():\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    except Interrupted: print('cleaning', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        for word in (b"ready\n", b"cleaning\n"):
            assert process.stdout.readline() == word
            process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_a_signal_waits_for_what_must_not_be_cut() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def work() -> None:
        with Signals().installed() as signals:
            with signals.deferred():
                signal.raise_signal(signal.SIGINT)
                done.append("whole")
            done.append("not reached")

    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        work()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_outside_the_main_thread_do_nothing(run: Run) -> None:
    def in_thread() -> None:
        with Signals().installed() as signals:
            conduct(scripted.Scripted(run), run, budget=Budget(trials=5), progress=Silent(), signals=signals)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert len(run.trials()) == 5


def test_two_workers_on_one_record_lose_nothing(run: Run) -> None:
    """They divide the seeds, and each goes on from what both have finished."""
    scripted.drive(run, scripted.Scripted(run), trials=2)
    workers = [start(run, "--trials", "40", "--sleep", "0.01", "--index", str(i), "--of", "2") for i in range(2)]
    assert [w.wait() for w in workers] == [0, 0]
    trials = run.trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    assert len(trials) in (40, 41)
    found = evaluated(run)
    assert len(found) == len(trials) - 2
    policies = [scripted.space().decode(v).digest for v in seeds(scripted.space())]
    assert [found.count(digest) for digest in policies if digest != Candidate().digest] == [1] * 11
    writers = {e["process"] for e in events(run, "trial") if e["number"] >= 2}
    assert writers == {w.pid for w in workers}


def test_a_worker_without_its_parent_ends(run: Run) -> None:
    scripted.drive(run, scripted.Scripted(run), trials=2)
    budget = Budget(trials=1000, parent=os.getpid())
    contribute(scripted.Scripted(run), run, budget=budget, signals=Signals(), index=0, of=1)
    assert len(run.trials()) == 2
    assert events(run, "run_ended")[-1]["reason"] == "parent ended"


def test_a_worker_needs_a_baseline(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the study 'scripted' has no fp32 baseline yet"):
        contribute(scripted.Scripted(run), run, budget=Budget(trials=4), signals=Signals(), index=None, of=1)
    with pytest.raises(RunError, match="the storage has no study 'x'"):
        worker(f"sqlite:///{tmp_path / 'none.db'}", "x")


def test_limits_are_constraints_of_every_trial(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", scripted.config(limits=Limits(max_latency_ms=1.0, max_accuracy_drop=2.0)))
    scripted.drive(run, scripted.Scripted(run), trials=8)
    frozen = optuna.load_study(study_name="scripted", storage=run.storage).trials
    for trial, stored in zip(run.trials(), frozen, strict=True):
        assert trial.score is not None
        assert set(stored.constraints) == {"max_latency_ms", "max_accuracy_drop"}
        assert (stored.constraints["max_latency_ms"] <= 0) == (trial.score.latency_ms <= 1.0)


def test_an_fp32_that_fails_ends_the_search_with_its_reason(run: Run) -> None:
    class NoFp32(scripted.Scripted):
        def evaluate(self, candidate: Candidate, role: Role, *, rivals: Sequence[Rival] = ()) -> Trial:
            failure = Failure(stage="load", error="Fail", message="unsupported opset")
            return replace(super().evaluate(candidate, role, rivals=rivals), outcome=failure, measurement=None)

    with pytest.raises(TargetError, match="the fp32 baseline failed in stage 'load': unsupported opset"):
        scripted.drive(run, NoFp32(run))
    scripted.drive(run, scripted.Scripted(run), trials=5)
    assert run.front().baselines["fp32"].number == 1


def test_an_objective_that_cannot_be_measured_is_said_at_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", scripted.config(objectives=("accuracy", "latency", "energy")))
    with pytest.raises(TargetError, match="objective 'energy' cannot be measured here: scripted"):
        scripted.drive(run, scripted.Scripted(run))
    assert len(run.trials()) == 1


def test_the_log_tells_where_the_time_went(run: Run) -> None:
    scripted.drive(run, scripted.Scripted(run, sleep=0.02), trials=10)
    assert events(run)[0]["event"] == "run_started"
    assert [e["number"] for e in events(run, "trial")] == list(range(10))
    last = events(run, "trial")[-1]
    assert last.keys() >= {"role", "outcome", "accuracy", "ratio", "size_bytes", "seconds", "cached"}
    changes = [set(e["entered"]) for e in events(run, "front_changed")]
    assert {0} in changes
    (ended,) = events(run, "run_ended")
    assert ended["stages"]["score"] == pytest.approx(0.1)
    assert 0 < ended["overhead"] < 1
    work = ended["stages"]["score"] + ended["stages"]["measure"] + ended["stages"]["finalise"]
    assert ended["overhead"] == pytest.approx(1 - work / ended["seconds"])


def test_progress_is_told_of_every_trial(run: Run) -> None:
    watching = Watching()
    scripted.drive(run, scripted.Scripted(run), trials=20, progress=watching)
    assert [t.number for t, _ in watching.told] == list(range(20))
    status = watching.told[-1][1]
    assert (status.done, status.budget, status.failures, status.eta_s) == (20, 20, 0, 0.0)
    assert set(status.baselines) == {"fp32", "uniform-int8"}
    assert [t.number for t in status.front] == [t.number for t in run.front().points]


def test_without_a_terminal_progress_is_plain_lines(run: Run) -> None:
    stream = io.StringIO()
    scripted.drive(run, scripted.Scripted(run), trials=10, progress=Lines(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "fp32 baseline"
    assert lines[1] == "fp32: accuracy 0.9500, 2 ms, 0.192 MB"
    assert any(line.startswith("trial 10/10, ") and "points on the front" in line for line in lines)
    assert "\x1b" not in stream.getvalue()


def test_a_run_resumes_under_its_own_terms_only(run: Run) -> None:
    same = scripted.config(trials=500, seed=7, timeout_s=3.0, created="later")
    assert _resumed(run.path, same) == run
    other = replace(scripted.PROFILE, name="other")
    for changed, sentence in (
        ({"task_name": "digits"}, "was started with `task_name` = 'scripted', not 'digits': resume it with the same"),
        ({"profile": other}, "was started with `profile` = 'scripted', not 'other'"),
        ({"rules": replace(scripted.RULES, precision_by="layer")}, "another version of rules 'scripted'"),
        ({"objectives": ("accuracy", "latency", "size")}, "was started with `objectives` = "),
        ({"limits": Limits(max_size_mb=1.0)}, "was started with `limits` = "),
        ({"storage": "sqlite:///elsewhere.db"}, "has its record elsewhere than in the storage given"),
    ):
        with pytest.raises(RunError, match=sentence):
            _resumed(run.path, scripted.config(**changed))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"trials": 0}, InputError, "`trials` must be at least 1, got 0"),
        ({"trials": None}, InputError, "a search needs an end: give `trials`, `timeout` or both"),
        ({"timeout": -1.0}, InputError, r"`timeout` must be positive seconds, got -1\.0"),
        ({"workers": 0}, InputError, "`workers` must be at least 1, got 0"),
        ({"fidelity": "full"}, InputError, "`fidelity` must be 'oneshot' or 'recover', got 'full'"),
        ({"fidelity": "recover"}, InputError, "fidelity 'recover' needs `recover_steps`, or a `timeout`"),
        ({"recover_steps": 5}, InputError, "fidelity 'oneshot' trains nothing: it does not go with 5"),
        ({"on": "ssh:there"}, InputError, "a host is 'local', 'ssh:user"),
        ({"objectives": ("latency",)}, InputError, "objectives are accuracy,latency and optionally others"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        search("digits", scripted.PROFILE, **arguments)


def test_a_directory_that_does_not_fit_is_said_before_the_task_is_loaded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a run already: continue it with --resume"):
        search("no such task", scripted.PROFILE, out=run.path)
    with pytest.raises(RunError, match=r"nothing is no run: there is no such directory"):
        search("no such task", scripted.PROFILE, out=tmp_path / "nothing", resume=True)
    with pytest.raises(InputError, match="`resume` needs `out`: the run to continue"):
        search("no such task", scripted.PROFILE, resume=True)


def test_a_moved_run_is_open_to_workers(run: Run, tmp_path: Path) -> None:
    """The record names the place where the run was last searched."""
    scripted.drive(run, scripted.Scripted(run), trials=2)
    run.path.rename(tmp_path / "moved")
    moved = open_run(tmp_path / "moved")
    scripted.drive(moved, scripted.Scripted(moved), trials=3)
    study = optuna.load_study(study_name="scripted", storage=moved.storage)
    assert study.user_attrs["run"] == str(tmp_path / "moved")

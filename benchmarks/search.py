"""How many trials and how much time the default sampler needs for what stock samplers reach, on public tasks.

Each arm is a one-shot search in a process of its own, on one torch thread, with its own number of trials and seed; what
is finished is not searched again, and what was interrupted is continued.

    python benchmarks/search.py run path/to/fashion_resnet/task.py --seeds 0,1,2 --jobs 2
    python benchmarks/search.py run benchmarks/fashion.py:depthwise --jobs 2
    python benchmarks/search.py table

A latency is measured once in each run, so that the luck of one measurement would be a part of the comparison. In the
table all runs of a task share one latency for equal kernels: the geometric mean of what they measured. The figure of
merit is the hypervolume of the first so many trials, up to 10 points below fp32 and up to its latency.

The limit is one fifth of NSGA-II's trials until its hypervolume is reached, median of at least three seeds, with the
lowest and highest of them beside it. Probes count as the trials that would have ended in their time, and the seconds
until then are wall time since the search began, probes included. The others have 100 trials, a fifth, and all are
compared there. All arms score the same 500 of the validation items and measure briefly.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np

from autocompress import Run, open_run, search
from autocompress.config import load_profile
from autocompress.core.front import Limits, hypervolume
from autocompress.core.trial import Trial
from autocompress.task import load_task
from benchmarks.versus import finite

RESULTS = Path(__file__).parent / "results" / "search.json"
TARGET, OURS, BAR = "cpu-onnxruntime", "surrogate", "nsga2"
ARMS = (OURS, BAR, "tpe", "random")
WORST_DROP, LIMIT = 0.10, 0.2
SEEDS, BAR_TRIALS = 3, 500  # fewer decide nothing
ITEMS, AT = 500, 100
BRIEF: Mapping[str, Any] = {"target_ci": 0.05, "max_duration_s": 0.3, "warmup_s": 0.02, "processes": 1}
FIGURES = ("hypervolume", f"at_{AT}", "trials", "trials_to_bar", "seconds", "seconds_to_bar")
LIMITS = Limits(max_accuracy_drop=30)  # a constraint all arms have; no arm is told the region that is scored


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One search of the comparison."""

    task: str
    sampler: str
    seed: int
    trials: int

    def folder(self, work: Path) -> Path:
        """Of its run."""
        return work / f"{Path(self.task.partition(':')[0]).stem}-{digest(self.task)}-{self.sampler}-{self.seed}"


def digest(reference: str) -> str:
    """What of a task's reference tells it from others in a file name."""
    path, _, name = reference.partition(":")
    return name or Path(path).resolve().parent.name


def ended(arm: Arm, work: Path) -> bool:
    """Whether its run has all its trials."""
    folder = arm.folder(work)
    return (folder / "run.json").exists() and len(open_run(folder).trials()) >= arm.trials


def one(arm: Arm, work: Path) -> None:
    """Search, or go on where it was interrupted."""
    import torch
    from torch.utils.data import Subset

    torch.set_num_threads(1)
    folder, task, profile = arm.folder(work), load_task(arm.task), load_profile(TARGET)
    count = len(task.validation)  # type: ignore[arg-type]
    some = np.unique(np.linspace(0, count - 1, min(ITEMS, count)).astype(int)).tolist()
    search(
        dataclasses.replace(task, validation=Subset(task.validation, some), test=None),
        dataclasses.replace(profile, measure=dataclasses.replace(profile.measure, **BRIEF)),
        trials=arm.trials,
        seed=arm.seed,
        limits=LIMITS,
        sampler=arm.sampler,  # type: ignore[arg-type]
        out=folder,
        resume=(folder / "run.json").exists(),
    )


def run(given: argparse.Namespace) -> int:
    """All arms that have not ended, so many at once; 1 where one of them fails."""
    trials = {name: int(n) for name, n in (part.split("=") for part in given.trials.split(","))}
    load_task(given.task).model()  # a task that trains its model on first use does so once, here
    arms = [
        Arm(task=given.task, sampler=sampler, seed=seed, trials=trials[sampler])
        for seed in map(int, given.seeds.split(","))
        for sampler in given.arms.split(",")
    ]

    def alone(arm: Arm) -> bool:
        command = [sys.executable, __file__, "one", arm.task, arm.sampler, str(arm.seed), str(arm.trials)]
        made = subprocess.run([*command, "--work", str(given.work)], stderr=subprocess.PIPE, text=True)
        last = "done" if made.returncode == 0 else f"FAILED: {(made.stderr.strip().splitlines() or ['?'])[-1]}"
        print(f"{arm.task} {arm.sampler}, seed {arm.seed}: {last}", flush=True)
        return made.returncode == 0

    with ThreadPoolExecutor(given.jobs) as pool:
        return 0 if all(list(pool.map(alone, [arm for arm in arms if not ended(arm, given.work)]))) else 1


def key_of(trial: Trial) -> str:
    """Files of equal kernels share a latency."""
    return trial.role if trial.role == "uniform-int8" else trial.candidate.kernel_key


def shared_ratios(runs: Sequence[Sequence[Trial]]) -> dict[str, float]:
    """One ratio for each key: the geometric mean over the runs that measured it."""
    logs: defaultdict[str, list[float]] = defaultdict(list)
    for trials in runs:
        last = {key_of(t): t.score.ratio for t in trials if t.score is not None}  # the last one knows all repeats
        for key, ratio in last.items():
            logs[key].append(math.log(ratio))
    return {key: math.exp(statistics.fmean(found)) for key, found in logs.items()}


def volumes(trials: Sequence[Trial], ratios: Mapping[str, float]) -> list[float]:
    """Hypervolume after each trial of a run; one that was scored in part adds nothing."""
    fp32 = next(t.score.accuracy for t in trials if t.role == "fp32" and t.score is not None)
    corner, losses, found = np.array([WORST_DROP - fp32, 1.0]), list[tuple[float, float]](), list[float]()
    for trial in trials:
        if trial.score is not None and trial.score.items is None:
            losses.append((-trial.score.accuracy, ratios[key_of(trial)]))
        found.append(hypervolume(np.array(losses).reshape(-1, 2), corner))
    return found


def ends(run: Run) -> tuple[dict[int, float], float]:
    """Wall seconds at which each trial ended, without pauses between a run's processes; and those of its probes."""
    found, total, last, probes = dict[int, float](), 0.0, None, 0.0
    for line in (run.path / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        now = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "run_started" or last is None:
            last = now
        total, last = total + now - last, now
        if event["event"] in ("trial", "failure"):
            found[event["number"]] = total
        if event["event"] == "sensitivity":
            probes += event.get("seconds", 0.0)
    return found, probes


def reached(figures: Sequence[float], bar: float) -> int | None:
    """After how many trials the bar is reached; None where it is not."""
    return next((count for count, value in enumerate(figures, start=1) if value >= bar), None)


def summary(task: str, arms: Mapping[tuple[str, int], Run]) -> dict[str, Any]:
    """All arms of a task: hypervolumes, and when each reaches that of the bar with the same seed."""
    trials = {key: run.trials() for key, run in arms.items()}
    ratios = shared_ratios(list(trials.values()))
    figures = {key: volumes(found, ratios) for key, found in trials.items()}
    rows = []
    for (sampler, seed), found in figures.items():
        seconds, probes = ends(arms[sampler, seed])
        bar = figures[BAR, seed][-1] if (BAR, seed) in figures else None
        count = None if bar is None else reached(found, bar)
        at = None if count is None else seconds.get(trials[sampler, seed][count - 1].number)
        a_trial = statistics.median(b - a for a, b in itertools.pairwise(sorted(seconds.values())))
        probe_trials = math.ceil(probes / a_trial)
        failed = sum(t.score is None for t in trials[sampler, seed])
        rows.append(
            {
                "sampler": sampler, "seed": seed, "trials": len(found), "hypervolume": found[-1],
                f"at_{AT}": found[min(AT, len(found)) - 1], "failures": failed,
                "seconds": max(seconds.values()), "probe_seconds": probes, "probes_as_trials": probe_trials,
                "trials_to_bar": None if count is None else count + probe_trials, "seconds_to_bar": at,
            }
        )  # fmt: skip
    return {"task": task, "layers": layers_of(arms), "rows": rows, **over_seeds(rows)}


def layers_of(arms: Mapping[tuple[str, int], Run]) -> int:
    """Of the task's model."""
    log = next(iter(arms.values())).path / "log.jsonl"
    events = map(json.loads, log.read_text().splitlines())
    return next(int(e["layers"]) for e in events if e["event"] == "model")


def spread(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Median, lowest and highest; what was never reached counts as more than all."""
    known = [math.inf if value is None else float(value) for value in values]
    return statistics.median(known), min(known), max(known)


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures by sampler over its seeds; and the verdict, by the seeds that both sides of it have."""
    samplers: dict[str, dict[str, tuple[float, float, float]]] = {}
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        of = [row for row in rows if row["sampler"] == sampler]
        samplers[sampler] = {name: spread([row[name] for row in of]) for name in FIGURES}
    ours, bars = ({row["seed"]: row for row in rows if row["sampler"] == name} for name in (OURS, BAR))
    bars = {seed: row for seed, row in bars.items() if row["trials"] >= BAR_TRIALS}
    pairs = [(ours[seed], bars[seed]) for seed in ours if seed in bars]
    missing = [name for name in ARMS if name not in samplers]
    if len(pairs) < SEEDS:
        why = f"{len(pairs)} seeds of {SEEDS} with {BAR_TRIALS} trials of {BAR}"
        return {"samplers": samplers, "not_run": missing, "undecided": why}
    shares = {
        f"share_of_{what}": spread([None if (a := o[f"{what}_to_bar"]) is None else a / b[what] for o, b in pairs])
        for what in ("trials", "seconds")
    }
    return {"samplers": samplers, "not_run": missing, **shares, "met": shares["share_of_trials"][0] <= LIMIT}


def show(found: Mapping[str, Any]) -> None:
    """The table of a task."""
    print(f"\n{found['task']}, {found['layers']} layers; the bar is {BAR}'s hypervolume at its last trial, by seed")
    print(
        f"{'sampler':>10} {'seed':>5} {'trials':>7} {'volume':>7} {f'at {AT}':>7} {'seconds':>8} {'probes s':>9}",
        end="",
    )
    print(f" {'to bar':>7} {'seconds':>8} {'failed':>7}   to bar: trials, probes among them, and seconds")
    for row in found["rows"]:
        count = "-" if row["trials_to_bar"] is None else row["trials_to_bar"]
        at = "-" if row["seconds_to_bar"] is None else f"{row['seconds_to_bar']:.0f}"
        print(f"{row['sampler']:>10} {row['seed']:>5} {row['trials']:>7} {row['hypervolume']:>7.4f}", end="")
        print(f" {row[f'at_{AT}']:>7.4f} {row['seconds']:>8.0f} {row['probe_seconds']:>9.1f}", end="")
        print(f" {count:>7} {at:>8} {row['failures']:>7}")
    for sampler, of in found["samplers"].items():
        row = {name: figures[0] for name, figures in of.items()}
        print(
            f"{sampler:>10} {'med':>5} {row['trials']:>7.0f} {row['hypervolume']:>7.4f} {row[f'at_{AT}']:>7.4f}",
            end="",
        )
        print(f" {row['seconds']:>8.0f} {'':>9} {row['trials_to_bar']:>7.0f} {row['seconds_to_bar']:>8.0f}")
    if found["not_run"]:
        print(f"not run: {', '.join(found['not_run'])}")
    if "undecided" in found:
        print(f"not decided: {found['undecided']}")
        return
    shares = [
        "{:.2f} [{:.2f} to {:.2f}] of its {}".format(*found[f"share_of_{what}"], what) for what in ("trials", "seconds")
    ]
    verdict = "met" if found["met"] else "MISSED"
    print(f"{OURS} reaches the last volume of {BAR} in {' and '.join(shares)}: {verdict} (at most {LIMIT:g} of trials)")


def table(given: argparse.Namespace) -> int:
    """Tables of the tasks in the work folder; 1 where the limit is missed, or nothing decided, on one of them."""
    runs: defaultdict[str, dict[tuple[str, int], Run]] = defaultdict(dict)
    for path in sorted(given.work.glob("*/run.json")):
        run = open_run(path.parent)
        if run.config.trials is not None and len(run.trials()) >= run.config.trials:
            runs[run.config.task_name][run.config.sampler, run.config.seed] = run
    if not runs:
        raise SystemExit(f"{given.work} has no search that ended: `run` makes them")
    found = [summary(task, arms) for task, arms in runs.items()]
    for of in found:
        show(of)
    some = next(iter(next(iter(runs.values())).values()))
    facts = next((dict(t.measurement.fingerprint.facts) for t in some.trials() if t.measurement is not None), {})
    told = json.loads(given.out.read_text())["tasks"] if given.out.exists() else []  # of other tasks, kept
    kept = [of for of in told if of["task"] not in runs]
    record = {"tasks": [*kept, *({**of, "machine": facts} for of in found)]}
    given.out.write_text(json.dumps(finite(record), indent=1) + "\n")
    return 0 if all(of.get("met", False) and not of["not_run"] for of in found) else 1


def main() -> int:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("run", "one", "table"):
        command = commands.add_parser(name)
        command.add_argument("--work", type=Path, default=Path("runs/search-benchmark"))
        if name == "table":
            command.add_argument("--out", type=Path, default=RESULTS)
            continue
        command.add_argument("task", help="reference of a task")
        if name == "run":
            command.add_argument("--arms", default=",".join(ARMS))
            command.add_argument("--seeds", default="0,1,2")
            command.add_argument("--trials", default=f"surrogate={AT},nsga2={BAR_TRIALS},tpe={AT},random={AT}")
            command.add_argument("--jobs", type=int, default=2)
        else:
            command.add_argument("sampler")
            command.add_argument("seed", type=int)
            command.add_argument("trials", type=int)
    given = parser.parse_args()
    if given.command == "table":
        return table(given)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.command == "run":
        return run(given)
    one(Arm(task=given.task, sampler=given.sampler, seed=given.seed, trials=given.trials), given.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether one search over bits, widths and depth beats one of them alone, or one after the other, in equal wall time.

Four arms, each with recovery and two processes: `joint` (all of it), `quantize` (bits only), `prune` (widths and depth
only, all float), and `sequential`: half the time for pruning, then the other half for the bits of the models of that
front which are most accurate for their latency, each taken as a finished model. All files of a seed are timed in one
round-robin and scored on test items; what is compared is the hypervolume, up to 10 points below fp32 and up to its
latency.

    python benchmarks/joint.py path/to/fashion_resnet/task.py --minutes 15 --seeds 0,1,2
    python benchmarks/joint.py TASK.py --work /tmp/try --minutes 1 --seeds 0 --out /tmp/joint.json      # to try it

Searches that are done are not made again. fp32 is everybody's, uniform INT8 that of all arms that quantize. Exits with
1 where joint does not win: where its mean gain over some other arm is not above zero by its 95 % interval over seeds.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np

from autocompress import Run, Task, open_run
from autocompress.build import Builder, Stopwatch
from autocompress.config import load_profile, load_space
from autocompress.core.artifact import Artifact
from autocompress.core.front import hypervolume
from autocompress.core.measurement import Interval
from autocompress.core.space import SpaceRules
from autocompress.core.trial import Trial
from autocompress.task import check_task, load_task
from benchmarks.front import artifacts_of, files_of, searched
from benchmarks.probe import T95
from benchmarks.versus import WORST_DROP, WORST_RATIO, File, finite, show, versus

if TYPE_CHECKING:
    from torch import nn

RESULTS = Path(__file__).parent / "results" / "joint.json"
OTHERS = ("quantize", "prune", "sequential")
ALL = ("joint", *OTHERS)
PRUNED = 2  # models of the pruned front whose bits are searched


def space_of(arm: str) -> SpaceRules:
    """What an arm searches."""
    everything = dataclasses.replace(load_space("default"), skip=("*",))
    if arm == "quantize":
        return dataclasses.replace(everything, name="quantize", widths=(), skip=(), students=())
    if arm == "prune":
        return dataclasses.replace(everything, name="prune", layers=(), calibrators=("minmax",))
    return everything


def pruned_task(reference: str, run: str, number: int) -> Task:
    """The task of a model that a search made: its shapes and recovered weights are where the next one begins."""
    base = load_task(reference)

    def build() -> "nn.Module":
        found = open_run(run)
        (trial,) = [t for t in found.trials() if t.number == number]
        builder = Builder(check_task(base), found.path, found.config.profile)
        return builder.compressed(trial.candidate, Stopwatch()).model.eval()

    return dataclasses.replace(base, name=f"{base.name}-pruned-{number}", model=build, student=None)


def best_for_latency(run: Run, count: int) -> list[Trial]:
    """Candidates of a front that together have most of its hypervolume, the largest part first."""
    front = run.front()
    fp32 = front.baselines["fp32"].score
    assert fp32 is not None
    corner = np.array([WORST_DROP - fp32.accuracy, WORST_RATIO])
    left = {t.number: (-t.score.accuracy, t.score.ratio) for t in front.points if t.role == "candidate" and t.score}
    chosen: list[int] = []
    while left and len(chosen) < count:
        taken = [(-t.score.accuracy, t.score.ratio) for t in front.points if t.number in chosen and t.score]
        chosen.append(max(left, key=lambda n: hypervolume(np.array([*taken, left[n]]), corner)))
        del left[chosen[-1]]
    return [t for n in chosen for t in front.points if t.number == n]


def sequential(given: argparse.Namespace, seed: int, folder: Path) -> tuple[dict[str, Artifact], float]:
    """Half the time prunes, the other half quantizes what came of it; files by name, and the seconds of it all."""
    first, seconds = searched(
        folder / "first", given.task, given.target, space_of("prune"),
        minutes=given.minutes / 2, workers=given.workers, seed=seed,
    )  # fmt: skip
    named = {f"pruned {n}": a for n, (_, a) in artifacts_of(first).items()}
    chosen = best_for_latency(first, PRUNED)
    for trial in chosen:
        source = folder / f"pruned_{trial.number}.py"
        source.write_text(
            "import sys\n\n"
            f"sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n\n"
            "from benchmarks.joint import pruned_task\n\n\n"
            "def task():\n"
            f"    return pruned_task({given.task!r}, {str(first.path)!r}, {trial.number})\n"
        )
        second, took = searched(
            folder / f"second-{trial.number}", str(source), given.target, space_of("quantize"),
            minutes=given.minutes / 2 / len(chosen), workers=given.workers, seed=seed,
        )  # fmt: skip
        named |= {f"pruned {trial.number}, {n}": a for n, (_, a) in artifacts_of(second).items()}
        seconds += took
    return named, seconds


def one_seed(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All arms with a seed, made or read, and compared."""
    named: dict[str, Artifact] = {}
    sides: dict[str, tuple[str, ...]] = {}
    seconds: dict[str, float] = {}
    for arm in ALL:
        folder = given.work / f"{seed}-{arm}"
        if arm == "sequential":
            folder.mkdir(exist_ok=True)
            files, seconds[arm] = sequential(given, seed, folder)
        else:
            run, seconds[arm] = searched(
                folder, given.task, given.target, space_of(arm),
                minutes=given.minutes, workers=given.workers, seed=seed,
            )  # fmt: skip
            found = artifacts_of(run)
            files = {name: artifact for name, (trial, artifact) in found.items() if trial.role == "candidate"}
            if arm == "joint":
                named |= (baselines := {n: a for n, (trial, a) in found.items() if trial.role != "candidate"})
                sides |= {n: tuple(s for s in ALL if n == "fp32" or s != "prune") for n in baselines}
        named |= {f"{arm}: {name}": artifact for name, artifact in files.items()}
        sides |= {f"{arm}: {name}": (arm,) for name in files}
    test = given.work / "data" / "test"
    measured, failed = files_of(given.task, given.target, named, sides, "joint", {}, test)
    compared = versus(measured, "joint", OTHERS, seed=seed)
    print(f"\nseed {seed}, {len(measured)} files")
    show(compared, "joint")
    return {
        "seed": seed,
        "seconds": seconds,
        "files": {arm: sum(f.sides == (arm,) for f in measured) for arm in ALL},
        "failed": failed,
        "machine": dict(measured[0].measurement.fingerprint.facts),
        "fronts": {arm: front_of(measured, arm) for arm in ALL},
        **compared,
    }


def front_of(files: Sequence[File], arm: str) -> list[dict[str, Any]]:
    """The files of an arm that no other one of its own beats, fastest first."""
    kept: list[File] = []
    for file in sorted((f for f in files if arm in f.sides), key=lambda f: (f.measurement.ratio, -f.accuracy)):
        if not kept or file.accuracy > kept[-1].accuracy:
            kept.append(file)
    return [{"name": f.name, "test": f.accuracy, "ratio": f.measurement.ratio} for f in kept]


def over_seeds(gains: Sequence[float]) -> tuple[float, Interval | None]:
    """The mean, and its 95 % interval by Student's t; None for a single seed."""
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return mean, None
    half = T95[min(len(gains) - 2, len(T95) - 1)] * statistics.stdev(gains) / len(gains) ** 0.5
    return mean, (mean - half, mean + half)


def main() -> int:
    """Search, compare, print, write; 1 where joint does not win."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="reference of a task that classifies and has a test split")
    parser.add_argument("--target", default="cpu-onnxruntime")
    parser.add_argument("--minutes", type=float, default=15, help="of each arm")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/joint"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    load_profile(given.target)
    before = os.getloadavg()[0]
    seeds = [one_seed(given, seed) for seed in map(int, given.seeds.split(","))]
    print(f"\nhypervolume gained by joint, {given.minutes:g} minutes each, {len(seeds)} seeds")
    summary, won = {}, True
    for other in OTHERS:
        gains = [s["against"][other]["hypervolume_gain"] for s in seeds]
        separate = sum(s["against"][other]["interval"][0] > 0 for s in seeds)
        mean, interval = over_seeds(gains)
        wins = separate == len(seeds) if interval is None else interval[0] > 0
        won &= wins
        summary[other] = {"gain": mean, "interval": interval, "seeds": gains, "seeds_separated": separate}
        text = "" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        verdict = "joint wins" if wins else "joint does NOT win"
        print(f"over {other:>10}: {mean:+.4f}{text}, above zero by its own interval in {separate}: {verdict}")
    record = {
        "target": given.target, "minutes": given.minutes, "load_average": [before, os.getloadavg()[0]],
        "joint_wins": won, "summary": summary, "seeds": seeds,
    }  # fmt: skip
    given.out.write_text(json.dumps(finite(record), indent=1) + "\n")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())

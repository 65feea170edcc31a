"""The front of a search against the hand recipe in the same wall time, and against the runtime's own uniform INT8.

A search with recovery in two processes, then the hand recipe at many ratios and several lengths of training in two
processes, as many as fit into the time the search took. All files, the front's, the hand's in float and INT8, uniform
INT8 and fp32, are then timed in one round-robin and scored on the test items, which neither side saw. The hand's best
file at a level is chosen by its test accuracy, which is in its favour: the search's were chosen on validation items.

    python benchmarks/front.py path/to/fashion_resnet/task.py --target cpu-onnxruntime --minutes 45 --work runs/front
    python benchmarks/front.py TASK.py --work /tmp/try --minutes 1 --ratios 0.5 --epochs 0.02      # in five minutes

The search of a target and the hand's files stay in `--work`: what is there is not made again. A search that was
interrupted is made anew, since its time cannot be compared.

Exits with 1 where the model that the search's front gives for 0.5 points on validation items is not that good on test
items, or by the lower end of its interval not as much faster as asked; and where the search is not ahead by a 95 %
interval: in hypervolume, and at every level of accuracy but those where both sides have the same baseline.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch

from autocompress import Run, open_run, search
from autocompress.config import load_profile, load_space
from autocompress.core.artifact import Artifact
from autocompress.core.errors import NoPointError
from autocompress.core.space import SpaceRules
from autocompress.core.trial import Trial
from autocompress.device.local import LocalHost
from autocompress.task import check_task, load_task
from benchmarks import front_hand, hand_recipe
from benchmarks.versus import File, artifact_of, finite, hits_of, measured, show, versus

RESULTS = Path(__file__).parent / "results"
NEAR = 0.005  # at most so much below fp32
OVER_UNIFORM: Mapping[str, float] = {"onnxruntime": 2.0, "openvino": 1.5, "litert": 1.5}
OVER_FP32: Mapping[str, float] = {"onnxruntime": 6.0}


def searched(
    folder: Path, task: str, target: str, space: SpaceRules, *, minutes: float, workers: int, seed: int
) -> tuple[Run, float]:
    """A search with recovery, made or read, and the wall seconds it took."""
    record = folder / "wall_seconds.json"
    if record.exists():
        return open_run(folder), float(json.loads(record.read_text()))
    if folder.exists():
        if not (folder / "run.json").exists():
            raise SystemExit(f"{folder} is no search: name another place with --work")
        shutil.rmtree(folder)
    begin = time.monotonic()
    run = search(
        task,
        target,
        space=space,
        trials=None,
        timeout=60 * minutes,
        fidelity="recover",
        workers=workers,
        seed=seed,
        out=folder,
        progress=True,
    )
    seconds = time.monotonic() - begin
    record.write_text(json.dumps(seconds))
    return run, seconds


def artifacts_of(run: Run) -> dict[str, tuple[Trial, Artifact]]:
    """Trial and file of the baselines and of the front, by name."""
    front, found = run.front(), {}
    for trial in [*front.baselines.values(), *(t for t in front.points if t.role == "candidate")]:
        assert trial.artifact is not None
        artifact = dataclasses.replace(trial.artifact, path=str(run.path / trial.artifact.path))
        found[f"search {trial.number}" if trial.role == "candidate" else trial.role] = trial, artifact
    return found


def by_hand(given: argparse.Namespace, seconds: float, like: Artifact) -> dict[str, Artifact]:
    """The hand's files by name, made as far as the time goes."""
    jobs, folder = front_hand.grid(given.ratios, given.epochs), given.work / "hand"
    front_hand.run(jobs, given.task, folder, seconds)
    done = front_hand.finished(jobs, folder)
    suffix = {"tflite": "tflite"}.get(like.format, "onnx")
    if suffix == "tflite":
        module = hand_recipe.load(given.task)
        for job in done:
            front_hand.for_litert(module, job, folder, (like.inputs[0].name, like.outputs[0].name))
    return {
        f"hand {job.name} {kind}": artifact_of(folder / job.name / f"{kind}.{suffix}", like)
        for job in done
        for kind in ("fp32", "int8")
    }


def compared(given: argparse.Namespace, run: Run, hand: Mapping[str, Artifact]) -> tuple[list[File], dict[str, str]]:
    """All files timed in one round-robin and scored on test items; and what failed."""
    ours = artifacts_of(run)
    named = {name: artifact for name, (_, artifact) in ours.items()} | dict(hand)
    sides = {
        name: ("search",) if trial.role == "candidate" else ("search", "hand") for name, (trial, _) in ours.items()
    }
    known = {name: trial.score.accuracy for name, (trial, _) in ours.items() if trial.score is not None}
    return files_of(str(given.task), given.target, named, sides, "hand", known, given.work / "data" / "test")


def files_of(
    task: str,
    target: str,
    named: Mapping[str, Artifact],
    sides: Mapping[str, tuple[str, ...]],
    rest: str,
    known: Mapping[str, float],
    test: Path,
) -> tuple[list[File], dict[str, str]]:
    """Files by name, fp32 among them, timed in one round-robin and scored on the items in `test`; and what failed.

    Args:
        sides: whose each is; `rest` has the others.
        known: validation accuracies.
        test: a folder, written where it is not there yet.
    """
    checked, profile = check_task(load_task(task)), load_profile(target)
    if not test.exists():
        checked.write_split("test", test)
    labels = checked.targets("test")
    with LocalHost(profile) as host:
        print(f"timing {len(named)} files in one round-robin", file=sys.stderr, flush=True)
        times, failed = measured(host, named["fp32"], named, test, profile.measure.processes)
        files = [
            File(
                sides=sides.get(name, (rest,)),
                name=name,
                hits=hits_of(host, named[name], test, labels),
                measurement=measurement,
                size_bytes=named[name].size_bytes,
                validation=known.get(name),
            )
            for name, measurement in times.items()
        ]
    return files, failed


def near(files: Sequence[File], run: Run, runtime: str) -> dict[str, Any]:
    """The fastest of the search's files near fp32 on test, and the one its front gives for that limit."""
    by_name = {f.name: f for f in files}
    fp32, uniform = by_name["fp32"], by_name["uniform-int8"]
    within = [f for f in files if f.sides == ("search",) and f.accuracy >= fp32.accuracy - NEAR - 1e-9]
    found: dict[str, Any] = {"fastest_on_test": None, "picked_on_validation": None, "met": False}
    if within:
        found["fastest_on_test"] = _rates(min(within, key=lambda f: f.measurement.ratio), uniform, fp32)
    try:
        picked = run.front().pick(max_accuracy_drop=100 * NEAR)
    except NoPointError as error:
        found["picked_on_validation_reason"] = str(error)
        return found
    rates = found["picked_on_validation"] = _rates(
        by_name[f"search {picked.number}" if picked.role == "candidate" else picked.role], uniform, fp32
    )
    found["met"] = (
        rates["test"] >= fp32.accuracy - NEAR - 1e-9
        and rates["over_uniform_int8"][1][0] >= OVER_UNIFORM[runtime]
        and rates["over_fp32"][1][0] >= OVER_FP32.get(runtime, 0)
    )
    return found


def _rates(file: File, uniform: File, fp32: File) -> dict[str, Any]:
    return {
        "name": file.name,
        "test": file.accuracy,
        "points_below_fp32": 100 * (fp32.accuracy - file.accuracy),
        "over_uniform_int8": file.over(uniform),
        "over_fp32": file.over(fp32),
    }


def rows(files: Sequence[File]) -> list[dict[str, Any]]:
    """Figures by file, fastest first."""
    return [
        {
            "sides": f.sides, "name": f.name, "test": f.accuracy, "validation": f.validation,
            "ratio": f.measurement.ratio, "ratio_ci": f.measurement.ratio_ci, "bytes": f.size_bytes,
        }
        for f in sorted(files, key=lambda f: f.measurement.ratio)
    ]  # fmt: skip


def show_all(files: Sequence[File], result: Mapping[str, Any], given: argparse.Namespace, runtime: str) -> None:
    """The tables."""
    print(f"{'file':<24} {'test':>7} {'of fp32':>8} {'interval':>16} {'kB':>6}")
    for row in rows(files):
        low, high = row["ratio_ci"]
        print(f"{row['name']:<24} {100 * row['test']:>6.2f}% {row['ratio']:>8.3f} [{low:.3f}, {high:.3f}]", end="")
        print(f" {row['bytes'] / 1000:>6.0f}")
    print()
    show(result["versus"], "search")
    wanted = f"wanted: {OVER_UNIFORM[runtime]:g}x over uniform INT8"
    wanted += f" and {OVER_FP32[runtime]:g}x over fp32" if runtime in OVER_FP32 else ""
    print(f"\n{given.target}, at most {100 * NEAR:g} points below fp32 on test; {wanted}")
    for name in ("fastest_on_test", "picked_on_validation"):
        if (found := result["near"][name]) is None:
            print(f"{name.replace('_', ' ')}: none")
            continue
        texts = [
            f"{rate:.2f}x [{ci[0]:.2f}, {ci[1]:.2f}] over {what}"
            for what, (rate, ci) in (("uniform INT8", found["over_uniform_int8"]), ("fp32", found["over_fp32"]))
        ]
        below = found["points_below_fp32"]
        print(f"{name.replace('_', ' ')}: {found['name']}, {below:.2f} points below, {', '.join(texts)}")


def main() -> int:
    """Search, make by hand, compare, print, write; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="the task's file, with build_model and a task of tensors")
    parser.add_argument("--target", default="cpu-onnxruntime")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", default=front_hand.RATIOS, help="of channels that the hand cuts")
    parser.add_argument("--epochs", default=front_hand.EPOCHS, help="that the hand trains, in this order")
    parser.add_argument("--work", type=Path, default=Path("runs/front"))
    parser.add_argument("--out", type=Path, help="default is results/front-<target>.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    before, runtime = os.getloadavg()[0], load_profile(given.target).runtime
    run, seconds = searched(
        given.work / f"search-{given.target}",
        str(given.task),
        given.target,
        dataclasses.replace(load_space("default"), skip=("*",)),
        minutes=given.minutes,
        workers=given.workers,
        seed=given.seed,
    )
    torch.set_num_threads(1)
    hand = by_hand(given, seconds, artifacts_of(run)["fp32"][1])
    files, failed = compared(given, run, hand)
    result: dict[str, Any] = {
        "target": given.target,
        "task": run.config.task_name,
        "minutes": given.minutes,
        "search_seconds": seconds,
        "hand_seconds": json.loads((given.work / "hand" / "spent.json").read_text()),
        "trials": {rung: sum(t.rung == rung for t in run.trials()) for rung in ("oneshot", "short", "full")},
        "recover_steps": run.config.recover_steps,
        "load_average": [before, os.getloadavg()[0]],
        "machine": dict(files[0].measurement.fingerprint.facts),
        "failed": failed,
        "files": rows(files),
        "versus": versus(files, "search", ["hand"]),
        "near": near(files, run, runtime),
    }
    show_all(files, result, given, runtime)
    against = result["versus"]["against"]["hand"]
    better = against["interval"][0] > 0
    behind = [f"{100 * at['drop']:g}" for at in against["levels"] if at["ahead"] == "theirs"]
    even = [f"{100 * at['drop']:g}" for at in against["levels"] if at["ahead"] == "tie"]
    same = [f"{100 * at['drop']:g}" for at in against["levels"] if at["ahead"] == "same"]
    print(
        f"speed {'met' if result['near']['met'] else 'MISSED'}; hypervolume {'' if better else 'NOT '}larger;", end=" "
    )
    print(f"the hand is ahead at {', '.join(behind) or 'no level'}", end=", ")
    print(f"neither at {', '.join(even) or 'no level'}, both have the same file at {', '.join(same) or 'no level'}")
    out = given.out or RESULTS / f"front-{given.target}.json"
    out.write_text(json.dumps(finite(result), indent=1) + "\n")
    return 0 if result["near"]["met"] and better and not behind and not even else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does one training that all widths share beat one training a candidate, at equal processor time?

Width vectors are drawn by seed in three bands of multiply-adds, as many to each. Three arms recover all of them in the
same processor seconds, on one thread:

- `alone`: each is cut from the original, and learns the original's answers for so many steps;
- `elastic`: one training of shared weights for the seconds that `alone` took in all, then each is cut from them;
- `half`: shared weights for half of these seconds, then each learns for half of the steps.

Compared is the accuracy of the torch models on the test items, in float: no arm rounds anything, and what a file gives
differs by less than a tenth of a point (simulated.py).

    python benchmarks/elastic.py run path/to/fashion_resnet/task.py --seeds 0,1,2
    python benchmarks/elastic.py table

A line of JSON for each vector, arm and seed is added to results/elastic.jsonl; arms and seeds that stand there whole,
with as many steps, are skipped. `--scale 0.02` is for a trial.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
from torch import nn

from autocompress.build import Builder
from autocompress.compress.apply import SETTLE_BATCH, SETTLE_ITEMS, Setting
from autocompress.compress.cut import cut
from autocompress.compress.distill import Answers
from autocompress.compress.elastic import train_elastic
from autocompress.compress.multiply_adds import multiply_adds
from autocompress.compress.recover import train
from autocompress.compress.settle import settle_batchnorm
from autocompress.config import load_profile, load_space
from autocompress.core.candidate import Candidate
from autocompress.core.recipe import Train
from autocompress.task import CheckedTask, check_task, load_task

LINES = Path(__file__).parent / "results" / "elastic.jsonl"
BANDS = ((0.05, 0.15), (0.15, 0.35), (0.35, 0.65))  # shares of the original's multiply-adds
ARMS = ("alone", "elastic", "half")
STEPS = 300  # of `alone`, for each vector
TIMED = 20  # steps of the shared training by which its seconds are told: the widths of each are others
Widths = dict[str, int]


class Bench:
    """One task's model, and the width vectors that all arms recover."""

    def __init__(self, task: CheckedTask, folder: Path, count: int) -> None:
        profile = load_profile("cpu-onnxruntime")
        builder = Builder(task, folder, profile)
        self.task = task
        self.setting: Setting = builder.setting
        self.widths = load_space("default").resolve(builder.structure, profile).widths
        self.vectors = self._drawn(count)

    def cut(self, widths: Widths, base: nn.Module | None = None) -> nn.Module:
        """The original, or a model of its shape, at these widths with its BatchNorm settled."""
        model = self.setting.original if base is None else base
        narrow = cut(model, self.setting.anatomy, Candidate(widths=widths), before=Candidate())
        material = self.setting.material
        settle_batchnorm(narrow, material.call, (b for b, _ in material.calibration(SETTLE_ITEMS, SETTLE_BATCH)))
        return narrow

    def learn(self, model: nn.Module, steps: int, seed: int) -> None:
        """Towards the original's answers."""
        setting = self.setting
        train(
            model, Train(), setting.material, teachers=(setting.original,), steps=steps, seed=seed, cache=setting.cache
        )

    def share(self, steps: int, seed: int) -> nn.Module:
        """Weights that all widths share."""
        setting = self.setting
        return train_elastic(
            setting.original,
            setting.anatomy.groups,
            self.widths,
            setting.material,
            Train(),
            steps=steps,
            seed=seed,
            cache=setting.cache,
        )

    def know(self) -> None:
        """The original's answers for all items: they are kept, and belong to no arm."""
        setting, material = self.setting, self.setting.material
        answers = Answers(setting.original, material.call, material.items, fixed=material.fixed, folder=setting.cache)
        for rows in np.array_split(np.arange(material.items), max(1, material.items // 250)):
            answers(rows, material.fetch(rows.tolist())[0])
        answers.save()

    def accuracy(self, model: nn.Module) -> float:
        """The metric on the test items."""
        task, outputs, targets = self.task, [], []
        count = len(task.split("test"))
        for start in range(0, count, 250):
            inputs, wanted = task.batch("test", list(range(start, min(start + 250, count))))
            with torch.no_grad():
                outputs.append(task.call(model.eval(), inputs).numpy())
            targets.append(wanted.numpy())
        return task.metric(np.concatenate(outputs), np.concatenate(targets))

    def _drawn(self, count: int) -> list[tuple[int, Widths]]:
        """So many vectors for each band, with the band's number."""
        rng, found = np.random.default_rng(0), list[tuple[int, Widths]]()
        sample = self.task.batch("calibration", [0])[0]

        def cost(model: nn.Module) -> int:
            return sum(multiply_adds(model, lambda m: self.task.call(m, sample)).values())

        whole = cost(self.setting.original)
        while len(found) < count * len(BANDS):
            ratio = rng.uniform(0.2, 0.9)
            widths = {
                n: int(min(cs, key=lambda w: abs(w - cs[0] * ratio * rng.uniform(0.7, 1.3))))
                for n, cs in self.widths.items()
            }
            share = cost(cut(self.setting.original, self.setting.anatomy, Candidate(widths=widths), before=Candidate()))
            for number, (low, high) in enumerate(BANDS):
                if low <= share / whole < high and sum(b == number for b, _ in found) < count:
                    found.append((number, widths))
        return found


def alone(bench: Bench, steps: int, seed: int) -> tuple[list[float], float]:
    """Accuracies, and the processor seconds of all trainings."""
    begin, accuracies = time.process_time(), []
    untimed = 0.0
    for _, widths in bench.vectors:
        model = bench.cut(widths)
        bench.learn(model, steps, seed)
        before = time.process_time()
        accuracies.append(bench.accuracy(model))
        untimed += time.process_time() - before
    return accuracies, time.process_time() - begin - untimed


def shared(bench: Bench, seconds: float, part: float, steps: int, seed: int) -> tuple[list[float], float]:
    """Shared weights for a part of so many seconds, cutting aside; then so many steps for each vector."""
    laps = []
    for count in (1, 1 + TIMED):  # what begins and ends a training, however long, is in both
        begin = time.process_time()
        bench.share(count, seed)
        laps.append(time.process_time() - begin)
    begin = time.process_time()
    for _, widths in bench.vectors:
        bench.cut(widths)
    cuts = time.process_time() - begin
    a_step = (laps[1] - laps[0]) / TIMED
    begin = time.process_time()
    base = bench.share(max(1, round((part * (seconds - cuts) - laps[0]) / a_step)), seed)
    accuracies, untimed = [], 0.0
    for _, widths in bench.vectors:
        model = bench.cut(widths, base)
        if steps:
            bench.learn(model, steps, seed)
        before = time.process_time()
        accuracies.append(bench.accuracy(model))
        untimed += time.process_time() - before
    return accuracies, time.process_time() - begin - untimed


def run(given: argparse.Namespace) -> None:
    """Every arm and seed that is not there yet."""
    torch.set_num_threads(1)
    given.out.touch()
    steps = max(1, round(STEPS * given.scale))
    count = max(1, round(6 * min(1.0, given.scale * 10)))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(check_task(load_task(given.task)), Path(folder), count)
        bench.know()
        for seed in map(int, given.seeds.split(",")):
            for arm in ARMS:
                done = {(row["arm"], row["seed"]): row["arm_s"] for row in read(given.out) if row["steps"] == steps}
                if (arm, seed) in done:
                    continue
                if arm == "alone":
                    accuracies, seconds = alone(bench, steps, seed)
                else:
                    part, own = (1.0, 0) if arm == "elastic" else (0.5, steps // 2)
                    accuracies, seconds = shared(bench, done["alone", seed], part, own, seed)
                with given.out.open("a") as file:
                    for (band, widths), accuracy in zip(bench.vectors, accuracies, strict=True):
                        row = {"arm": arm, "seed": seed, "band": band, "steps": steps, "arm_s": round(seconds, 1)}
                        file.write(json.dumps(row | {"accuracy": accuracy, "widths": list(widths.values())}) + "\n")
                print(f"{arm} seed {seed}: {100 * statistics.fmean(accuracies):.2f} % in {seconds:.0f} s", flush=True)


def table(given: argparse.Namespace) -> None:
    """Means over vectors by band, with the spread over seeds, and what follows."""
    rows = read(given.out)
    most = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == most]  # those of shorter trials are beside the point
    print(f"{'multiply-adds':>16}  " + "  ".join(f"{arm:>14}" for arm in ARMS) + "   elastic - alone")
    ahead = []
    for band, (low, high) in enumerate(BANDS):
        means = {arm: by_seed(rows, arm, band) for arm in ARMS}
        if any(not found for found in means.values()):
            continue
        cells = [f"{statistics.fmean(m):.2f} ± {statistics.stdev(m) if len(m) > 1 else 0:.2f}" for m in means.values()]
        gains = [e - a for e, a in zip(means["elastic"], means["alone"], strict=False)]
        ahead.append(min(gains) > 0)
        print(f"{low:>7.2f} to {high:.2f}   " + "  ".join(f"{c:>14}" for c in cells), end="")
        print(f"   {statistics.fmean(gains):+.2f} [{min(gains):+.2f}, {max(gains):+.2f}]")
    seconds = [row["arm_s"] for row in rows if row["arm"] == "alone"]
    if ahead:
        where = [f"{low:.2f} to {high:.2f}" for (low, high), wins in zip(BANDS, ahead, strict=False) if wins]
        print(
            f"{len(rows)} rows, {statistics.median(seconds):.0f} processor seconds an arm. Elastic recovery is ahead",
            end=" ",
        )
        print(f"with every seed at {', '.join(where)} of the multiply-adds" if where else "with every seed nowhere")


def by_seed(rows: Sequence[dict[str, Any]], arm: str, band: int) -> list[float]:
    """Mean accuracy over the vectors of a band, per cent, for each seed."""
    seeds = sorted({row["seed"] for row in rows if row["arm"] == arm})
    return [
        100 * statistics.fmean(r["accuracy"] for r in rows if (r["arm"], r["band"], r["seed"]) == (arm, band, seed))
        for seed in seeds
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """`run` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("run")
    making.add_argument("task")
    making.add_argument("--seeds", default="0,1,2")
    making.add_argument("--scale", type=float, default=1.0)
    making.set_defaults(act=run)
    showing = commands.add_parser("table")
    showing.set_defaults(act=table)
    for command in (making, showing):
        command.add_argument("--out", type=Path, default=LINES)
    given = parser.parse_args()
    given.act(given)


if __name__ == "__main__":
    main()

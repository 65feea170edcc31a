"""What quantization-aware training says of a model while it trains, and what the exported file then gives.

For each row and seed, on all test items: accuracy and cross-entropy of the same bits rounded after training, of the
model in training, which simulates its bits, and of the file in its runtime.

    python benchmarks/simulated.py TASK.py --seeds 3
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.build import Builder, Stopwatch
from autocompress.compress.qat import Aware
from autocompress.compress.quantize import Learned
from autocompress.core.artifact import Artifact
from autocompress.scoring import read_outputs
from autocompress.task import CheckedTask, check_task, load_task
from benchmarks.techniques import RESULTS, Row, candidate, device_profile, rows

ROWS = ("cpu-onnxruntime aware: W8A8 aware", "cpu-onnxruntime aware: W4A8 aware", "cpu-litert litert: W8A8 aware")
BATCH = 250
LIMIT = 0.2  # points between simulated and deployed


def figures(logits: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    """Top-1 in percent, and cross-entropy in nats."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(targets)), targets]
    return {"top1": 100 * float((logits.argmax(1) == targets).mean()), "nats": float(nats.mean())}


def simulated(task: CheckedTask, model: nn.Module) -> NDArray[Any]:
    """Logits `[items, classes]` of a torch model over the test split."""
    found = []
    with torch.no_grad():
        for start in range(0, len(task.split("test")), BATCH):
            rows = range(start, min(start + BATCH, len(task.split("test"))))
            found.append(task.call(model, task.batch("test", rows)[0]).numpy())
    return np.concatenate(found)


def one(row: Row, seed: int, reference: str, steps: int) -> dict[str, Any]:
    """A row's figures, rounded after training, simulated and deployed."""
    task = check_task(load_task(reference))
    profile, host = device_profile(row.target)
    kept: list[NDArray[Any]] = []
    finish = Aware.finish

    def observed(aware: Aware) -> Learned:
        kept.append(simulated(task, aware.model.eval()))
        return finish(aware)

    with tempfile.TemporaryDirectory() as made, host:
        work = Path(made)
        (work / "artifacts").mkdir()
        task.write_split("test", work / "test")
        builder = Builder(task, work, profile)
        wanted = candidate(dataclasses.replace(row, steps=steps), seed, builder.structure, profile)
        plain = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, stages=Row.stages))

        def deployed(artifact: Artifact) -> NDArray[Any]:
            with tempfile.TemporaryDirectory() as out:
                host.outputs(artifact, work / "test", Path(out))
                return np.array(read_outputs(Path(out), task.outputs.names)[task.outputs.names[0]])

        after = deployed(builder.build(plain, Stopwatch()).artifact)
        with mock.patch.object(Aware, "finish", observed):
            aware = deployed(builder.build(wanted, Stopwatch()).artifact)
    targets = task.targets("test")
    named = {"after training": after, "simulated": kept[0], "deployed": aware}
    return {"row": row.key, "seed": seed, "steps": steps, **{k: figures(v, targets) for k, v in named.items()}}


def main() -> int:
    """Run, print, write; 1 where the simulation is further from the file than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="reference of the public task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)
    known, found = rows(), []
    for key in ROWS:
        for seed in range(given.seeds):
            found.append(one(known[key], seed, given.task, given.steps))
            told = {n: f"{v['top1']:.2f} % {v['nats']:.4f}" for n, v in found[-1].items() if isinstance(v, dict)}
            print(key, seed, told, flush=True)
    (RESULTS / "simulated.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    worst = max(abs(line["simulated"]["top1"] - line["deployed"]["top1"]) for line in found)
    for key in ROWS:
        gained = [line["deployed"]["nats"] - line["after training"]["nats"] for line in found if line["row"] == key]
        print(f"{key}: cross-entropy {statistics.fmean(gained):+.4f} against rounding after training")
    print(f"simulated and deployed differ by at most {worst:.2f} points: the limit is {LIMIT}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

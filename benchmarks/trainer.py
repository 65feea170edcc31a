"""How fast the recovery trainer is beside a training loop written by hand, on a public task.

Both train copies of the task's model on the same items with SGD and cross-entropy, in blocks of a few steps that take
turns (A B B A) in one process on one thread, on the process-CPU clock. The ratio is the hand's time over the
trainer's: 1 is as fast, 0.9 is 11 % slower. With `logits` the trainer learns from the original as well, whose answers
for these items are known from before; the loop by hand still learns from labels.

    python benchmarks/trainer.py path/to/fashion_resnet/task.py
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch
from torch import nn
from torch.nn import functional as F

from autocompress.build import Builder
from autocompress.compress.recover import train
from autocompress.config import load_profile
from autocompress.core.recipe import Distill, Train
from autocompress.device.fingerprint import Machine
from autocompress.task import check_task, load_task

RESULTS = Path(__file__).parent / "results" / "trainer.json"
BATCH = 256


def by_hand(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, orders: list[list[int]]) -> None:
    """The loop that a person writes."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for rows in orders:
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def seconds(act: Callable[[], object]) -> float:
    """Process-CPU time."""
    begin = time.process_time()
    act()
    return time.process_time() - begin


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="reference of the public task")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="in a turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = check_task(load_task(given.task))
    with tempfile.TemporaryDirectory() as folder:
        material = Builder(task, Path(folder), load_profile("cpu-onnxruntime"))._setting.material
        inputs, labels = material.fetch(range(material.items))
        images = next(iter(inputs.values()))
        model = copy.deepcopy(task.model).requires_grad_(True)
        order = material.orders(BATCH, 0)
        taken = [[int(i) for i in next(order)] for _ in range(given.steps)]
        found = {}
        for kind in ("none", "logits"):
            how = Train(optimizer="sgd", learning_rate=0.05, batch_size=BATCH, distill=Distill(kind=kind))

            def ours(how: Train = how) -> None:
                student = copy.deepcopy(task.model)
                train(student, how, material, teachers=[task.model], steps=given.steps, seed=0, cache=Path(folder))

            turns: dict[str, Callable[[], object]] = {
                "trainer": ours,
                "hand": lambda: by_hand(model, images, labels, taken),
            }
            for act in turns.values():  # warm-up, and the teacher's answers
                act()
            ratios = []
            for block in range(given.blocks):
                names = ("hand", "trainer", "trainer", "hand") if block % 2 else ("trainer", "hand", "hand", "trainer")
                spent = dict.fromkeys(turns, 0.0)
                for name in names:
                    spent[name] += seconds(turns[name])
                ratios.append(spent["hand"] / spent["trainer"])
                print(f"{kind}: {spent['hand'] / 2 / given.steps:.3f} s a step by hand, {ratios[-1]:.3f}", flush=True)
            spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            found[kind] = {name: round(value, 3) for name, value in spread.items()}
    RESULTS.write_text(
        json.dumps({"batch": BATCH, "load_average": os.getloadavg()[0], "cpu": Machine().cpu_model, **found}, indent=1)
        + "\n"
    )
    print(json.dumps(found))
    return 0 if all(f["ratio"] >= 0.9 for f in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

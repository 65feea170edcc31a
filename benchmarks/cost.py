"""What one candidate costs: a search on a ResNet-20-sized model, its time by stage from the run's own log.

The model has ResNet-20's shapes (32x32 images, widths 16, 32 and 64, three blocks a stage) and random weights whose
BatchNorm statistics are settled on random data: what a candidate costs does not depend on what the model knows.

The steady state is every scored candidate after the first `--skip`: by then the template is exported, the data is
written and the baselines are measured. A candidate's seconds are the time from one `trial` event of the log to the
next, so that nothing is left out; the stages are what the trial itself recorded.

    python benchmarks/cost.py
"""

import argparse
import cProfile
import itertools
import json
import os
import pstats
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from autocompress import Task, search
from autocompress.loop import WORK
from benchmarks.networks import Basic

CLASSES = 10
LIMIT_S, LIMIT_OVERHEAD = 1.5, 0.15


class ResNet20(nn.Module):
    """`image` `[batch, 3, 32, 32]` → logits `[batch, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.layers = nn.Sequential(*(Basic(*shape) for shape in shapes))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layers(functional.relu(self.bn(self.conv(image))))
        logits: Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def items(count: int, seed: int) -> TensorDataset:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (count,), generator=generator))


def model() -> ResNet20:
    """The network, always with the same random weights, its BatchNorm settled, in eval mode."""
    torch.manual_seed(0)
    net = ResNet20().train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(64, 3, 32, 32))
    return net.eval()


def task(count: int = 2000) -> Task:
    """The task, with so many validation items."""
    return Task(name="resnet20", model=model, train=items(512, 1), validation=items(count, 2))


def summary(events: Sequence[dict[str, Any]], skip: int) -> dict[str, Any]:
    """Seconds a candidate by stage in the steady state, and where the time of the whole search went."""
    trials = [e for e in events if e["event"] in ("trial", "failure")]
    ended = next(e for e in events if e["event"] == "run_ended")
    times = [datetime.fromisoformat(e["time"]).timestamp() for e in trials]
    walls = [after - before for before, after in itertools.pairwise(times)]
    steady = [(e, wall) for e, wall in zip(trials[1:], walls, strict=True) if e["number"] >= skip]
    scored = [(e, wall) for e, wall in steady if e["event"] == "trial"]
    if not scored:
        raise SystemExit(f"no candidate was scored after trial {skip}: ask for more --trials")
    stages = sorted({stage for e, _ in scored for stage in e["seconds"]})
    by_stage = {stage: statistics.fmean(e["seconds"].get(stage, 0.0) for e, _ in scored) for stage in stages}
    walls = [wall for _, wall in scored]
    mean = statistics.fmean(walls)
    return {
        "candidates": len(scored),
        "failures": len(steady) - len(scored),
        "latency_cached": sum(bool(e.get("cached")) for e, _ in scored),
        "candidate_s": mean,
        "candidate_median_s": statistics.median(walls),
        "candidate_max_s": max(walls),
        "stages_s": {**by_stage, "between stages": mean - sum(by_stage.values())},
        "search_s": ended["seconds"],
        "search_stages_s": ended["stages"],
        "overhead": ended["overhead"],
    }


def show(found: dict[str, Any]) -> None:
    """The table."""
    cached = found["latency_cached"]
    print(f"{found['candidates']} candidates in the steady state, {cached} with a latency known before")
    print(f"{'stage':>18} {'s a candidate':>14} {'share':>7}")
    for stage, seconds in sorted(found["stages_s"].items(), key=lambda row: -row[1]):
        print(f"{stage:>18} {seconds:>14.3f} {seconds / found['candidate_s']:>7.0%}")
    print(f"{'mean':>18} {found['candidate_s']:>14.3f}")
    print(f"{'median':>18} {found['candidate_median_s']:>14.3f}")
    print(f"\n{'stage':>18} {'s in all':>14} {'share':>7}")
    rest = found["search_s"] - sum(found["search_stages_s"].values())
    for stage, seconds in sorted({**found["search_stages_s"], "the rest": rest}.items(), key=lambda row: -row[1]):
        print(f"{stage:>18} {seconds:>14.2f} {seconds / found['search_s']:>7.0%}")
    print(f"{'whole search':>18} {found['search_s']:>14.2f}")
    print(f"outside {', '.join(WORK)}: {found['overhead']:.1%}")


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--skip", type=int, default=10, help="trials before the steady state")
    parser.add_argument("--items", type=int, default=2000, help="validation items")
    parser.add_argument("--space", default="default")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write cProfile's statistics of the search here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cost.json")
    return parser.parse_args()


def main() -> int:
    """Search, print, write; 1 where a limit is not met."""
    given = arguments()
    before, profiler = os.getloadavg()[0], cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        if given.profile:
            profiler.enable()
        run = search(
            task(given.items), "cpu-onnxruntime", space=given.space, trials=given.trials, out=Path(folder) / "run"
        )
        if given.profile:
            profiler.disable()
            pstats.Stats(profiler).dump_stats(given.profile)
        found = summary([json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()], given.skip)
        final = run.final() or run.trials()
        facts = next(dict(t.measurement.fingerprint.facts) for t in final if t.measurement is not None)
    show(found)
    met = found["candidate_s"] <= LIMIT_S and found["overhead"] <= LIMIT_OVERHEAD
    load = [round(before, 2), round(os.getloadavg()[0], 2)]
    print(f"load average {load[0]} before, {load[1]} after: at most {LIMIT_S} s and {LIMIT_OVERHEAD:.0%}", end=" ")
    print("are met" if met else "are NOT met")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"load_average": load, "items": given.items, "trials": given.trials, "machine": facts, **found}
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

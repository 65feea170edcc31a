"""Whether a search over a deep model ends in time: MobileNetV2, 53 layers, 300 one-shot trials in two processes.

The network has random weights whose BatchNorm is settled, sees blurred noise of 32x32 pixels, and is asked for its own
answers: what a search costs does not depend on what the model knows, but it needs an accuracy that falls as it is cut.

    python benchmarks/deep.py
    python benchmarks/deep.py --trials 6 --out /tmp/deep.json      # to try it
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from autocompress import Run, Task, search
from benchmarks.networks import Inverted, mobilenet_v2

RESULTS = Path(__file__).parent / "results" / "deep.json"
SIZE, CLASSES, LIMIT_MINUTES, LAYERS, TRIALS = 32, 10, 30.0, 53, 300
BRANCH = 0.2  # of what a block adds to its shortcut; random layers in a row turn rounding into noise


@functools.cache
def model() -> nn.Module:
    """The network, for ten classes. Its statistics are of its images, and it prefers no class: else all are of one."""
    torch.manual_seed(0)
    net, noise = mobilenet_v2().train(), images(256, 0)
    net[-1] = head = nn.Linear(1280, CLASSES)  # type: ignore[operator]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all that it sees
        if isinstance(module, Inverted) and module.shortcut:
            nn.init.constant_(module.layers[-1].weight, BRANCH)
    with torch.no_grad():
        for part in noise.split(64):
            net(part)
        logits = net.eval()(noise)
        head.bias -= logits.mean(0)
    return net


def images(count: int, seed: int) -> Tensor:
    """Blurred noise, `[count, 3, 32, 32]`."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")


def items(count: int, seed: int) -> TensorDataset:
    """Images, and what the network says of them."""
    found = images(count, seed)
    with torch.no_grad():
        labels = torch.cat([model()(part).argmax(1) for part in found.split(100)])
    return TensorDataset(found, labels)


def task() -> Task:
    """The task: agreement with itself."""
    return Task(name="mobilenet-v2-32", model=model, train=items(1000, 1), validation=items(1000, 2))


def stages(run: Run) -> dict[str, float]:
    """Seconds by stage, of all processes together."""
    spent: Counter[str] = Counter()
    for event in events(run):
        if event["event"] == "run_ended":
            spent.update(event["stages"])
    return dict(spent.most_common())


def events(run: Run) -> Sequence[dict[str, Any]]:
    """The log."""
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def main() -> int:
    """Search, print, write; 1 where it took too long or something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--target", default="cpu-onnxruntime")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        run = search(
            f"{Path(__file__).resolve()}:task",
            given.target,
            trials=given.trials,
            workers=given.workers,
            out=Path(folder) / "run",
            progress=True,
        )
        minutes = (time.monotonic() - begin) / 60
        trials, log = run.trials(), events(run)
        described = next(e for e in log if e["event"] == "model")
        front = run.front()
        result = {
            "layers": described["layers"],
            "groups": described["groups"],
            "variables": described["variables"],
            "trials": len(trials),
            "minutes": round(minutes, 2),
            "failures": [f"{t.number}: {t.outcome}" for t in trials if t.score is None],
            "probes": [
                {key: e[key] for key in ("probes", "seconds", "skipped") if key in e}
                for e in log
                if e["event"] == "sensitivity"
            ],
            "stages_s": {name: round(s, 1) for name, s in stages(run).items()},
            "front": [
                {"accuracy": t.score.accuracy, "ratio": t.score.ratio, "bytes": t.score.size_bytes}
                for t in front.points
                if t.score is not None
            ],
            "load_average": [before, os.getloadavg()[0]],
            "machine": next(dict(t.measurement.fingerprint.facts) for t in trials if t.measurement is not None),
        }
    print(f"{result['layers']} layers, {result['variables']} variables, {len(trials)} trials in {minutes:.1f} minutes")
    print(f"{'stage':>18} {'s, all processes':>18}")
    for name, seconds in result["stages_s"].items():
        print(f"{name:>18} {seconds:>18.1f}")
    print(f"{'front: accuracy':>18} {'of fp32':>8}")
    for row in result["front"]:
        print(f"{row['accuracy']:>18.4f} {row['ratio']:>8.3f}")
    for failure in result["failures"]:
        print(f"failed: {failure}")
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    met = (
        minutes <= LIMIT_MINUTES
        and not result["failures"]
        and result["layers"] >= LAYERS
        and sum(t.role == "candidate" for t in trials) >= TRIALS
    )
    print(
        f"at least {TRIALS} trials and {LAYERS} layers in at most {LIMIT_MINUTES:g} minutes, no failure: "
        f"{'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

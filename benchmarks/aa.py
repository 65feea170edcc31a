"""The A/A test: the same network against itself must never be called faster; a true 3 % must be ranked right.

Two files with the same network, and two whose work differs by a known share, are measured by the plan as a search
does it, in the worker process, again and again, while other processes load every core:

- A/A: the two equal files against each other. "Faster" claimed: the interval of the ratio excludes 1, or those of
  two measurements after each other are separated. Must be 0.
- 3 %: a stack of equal convolutions against one with about 3 % more of them. Ranked right: ratio on the right side
  of 1. Must be 95 %.

    python benchmarks/aa.py --repeats 200
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from autocompress.core.artifact import Artifact
from autocompress.core.measurement import Measurement, MeasurePlan, separated
from autocompress.core.profile import Profile
from autocompress.device.fingerprint import usable_cores
from autocompress.device.local import LocalHost
from tests.models import artifact_of, write_convs, write_inputs

LAYERS, MORE = 33, 34  # 3.03 % more equal layers
ITSELF = (1.0, 1.0)


@contextlib.contextmanager
def loaded(processes: int) -> Iterator[None]:
    """That many processes keep the cores and their caches busy meanwhile."""
    burn = "import numpy as np\na = np.random.rand(300, 300)\nwhile True: a = np.tanh(a @ a)"
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    others = [subprocess.Popen([sys.executable, "-c", burn], env=one_thread) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def files(folder: Path, channels: int, size: int) -> dict[str, Artifact]:
    """`a` and `b` are the same network in two files; `more` has 3 % more layers."""
    shape = (None, channels, size, size)
    layers = {"a": LAYERS, "b": LAYERS, "more": MORE}
    return {
        name: artifact_of(
            write_convs(folder / f"{name}.onnx", count, channels, size, note=name), shape=shape, outputs=shape
        )
        for name, count in layers.items()
    }


def repeat(profile: Profile, pair: Sequence[Artifact], inputs: Path, repeats: int, every: int) -> list[Any]:
    """Measurements of `pair`, a new worker process every `every` of them, with the seconds each took."""
    found = []
    with LocalHost(profile) as host:
        for i in range(repeats):
            if i % every == 0:
                host.close()
                host.measure(pair, inputs)  # the worker's start is nobody's time
            begin = time.perf_counter()
            (measurement,) = host.measure(pair, inputs)
            found.append((measurement, time.perf_counter() - begin))
    return found


def summary(found: Sequence[tuple[Measurement, float]]) -> dict[str, Any]:
    """Figures of one row of the table."""
    measurements = [m for m, _ in found]
    ratios = [m.ratio for m in measurements]
    intervals = [m.ratio_ci for m in measurements]
    return {
        "repeats": len(found),
        "faster": sum(separated(ci, ITSELF) for ci in intervals),
        "slower": sum(separated(ITSELF, ci) for ci in intervals),
        "separated_pairs": sum(separated(x, y) or separated(y, x) for x, y in itertools.pairwise(intervals)),
        "ratio_median": statistics.median(ratios),
        "ratio_sd": statistics.stdev(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "above_1": statistics.fmean(r > 1 for r in ratios),
        "half_width_median": statistics.median(math.log(hi / lo) / 2 for lo, hi in intervals),
        "blocks_median": statistics.median(len(m.samples) for m in measurements),
        "latency_ms": statistics.median(m.reference_ms for m in measurements),
        "seconds_median": statistics.median(s for _, s in found),
        "seconds_max": max(s for _, s in found),
    }


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="measurements in one worker process")
    parser.add_argument("--load", type=int, default=usable_cores(), help="busy processes beside it; 0 for none")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aa.json")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; 1 where a criterion is not met."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the busy processes are ended then too
    given = arguments()
    profile = Profile(
        name="aa", description="", runtime="onnxruntime", format="onnx", precisions={}, width_multiple=8,
        measure=MeasurePlan(),
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, loaded(given.load):
        made = files(Path(name), given.channels, given.size)
        x = np.random.default_rng(0).normal(size=(1, given.channels, given.size, given.size)).astype(np.float32)
        inputs = write_inputs(Path(name) / "inputs", input=x)
        for row, other in (("A/A", "b"), ("3 % more", "more")):
            rows[row] = summary(repeat(profile, [made["a"], made[other]], inputs, given.repeats, given.every))
        with LocalHost(profile) as host:
            facts = dict(host.fingerprint().facts)
    print(f"{'':>20}" + "".join(f"{row:>12}" for row in rows))
    for key in rows["A/A"]:
        print(f"{key:>20}" + "".join(f"{rows[row][key]:>12.4g}" for row in rows))
    claims = [rows["A/A"][key] for key in ("faster", "slower", "separated_pairs")]
    met = not any([*claims, rows["3 % more"]["separated_pairs"]])
    met = met and rows["3 % more"]["above_1"] >= 0.95
    print(f"beside {given.load} busy processes, load average {os.getloadavg()[0]:.1f}: {'met' if met else 'NOT met'}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"load": given.load, "load_average": os.getloadavg()[0], "met": met, "rows": rows, "machine": facts}
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

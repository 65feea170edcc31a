"""How long a sampler takes to propose a candidate, with many variables and a long record.

The variables are those of a network of 50 layers: a precision for each of 25 blocks, an override for each layer, and
a width for each of 75 groups. The record is made of scored trials around a front, as a search leaves them.

    python benchmarks/ask.py

Prints a table, writes results/ask.json, and exits with 1 where the default sampler takes longer than the limit.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution

from autocompress.core.candidate import Candidate
from autocompress.core.space import Choice, Values
from autocompress.core.trial import Score, Trial
from autocompress.optimize.record import close_storage, encode, open_storage
from autocompress.optimize.sampler import Guide
from autocompress.optimize.study import Study

LIMIT_MS = 50.0
UNKNOWN = ("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed")
SAMPLERS = ("surrogate", "nsga2", "tpe", "random")
OBJECTIVES = (("accuracy", "latency"), ("accuracy", "latency", "size"))


def variables() -> dict[str, tuple[Choice, ...]]:
    """150 of them."""
    found: dict[str, tuple[Choice, ...]] = {f"precision:b{i}": ("fp32", "w8a8", "w4a8") for i in range(25)}
    found |= {f"layer:l{i}": ("block", "fp32", "w8a8", "w4a8") for i in range(50)}
    return found | {f"width:g{i}": (64, 48, 32, 16) for i in range(75)}


def opened(sampler: str, path: Path, objectives: tuple[str, ...]) -> Study:
    """A study on the record in a file."""
    study = Study(
        f"sqlite:///{path}",
        "ask",
        objectives,
        variables(),
        digest=lambda values: json.dumps(sorted(values.items())),
        seed=0,
        sampler=sampler,
    )
    blocks = {f"l{i}": f"b{i // 2}" for i in range(50)}
    study.guide(Guide(bounds={"accuracy": 0.8, "latency": 1.0}, best_accuracy=0.9, blocks=blocks))
    return study


def fill(path: Path, objectives: tuple[str, ...], trials: int) -> None:
    """So many scored trials, from nearly the original to the narrowest, written as a study writes them."""
    opened("random", path, objectives).close()
    space, rng = variables(), np.random.default_rng(0)
    distributions = {name: CategoricalDistribution(choices) for name, choices in space.items()}
    storage = open_storage(f"sqlite:///{path}")
    record = optuna.load_study(study_name="ask", storage=storage)
    for i in range(trials):
        near = rng.uniform()
        values = {n: cs[0] if rng.uniform() < near else cs[int(rng.integers(len(cs)))] for n, cs in space.items()}
        record.add_trial(encode(trial(values), values, distributions, objectives, {}, {}, str(i)))
    close_storage(storage)


def trial(values: Values) -> Trial:
    """A trial whose figures follow from its values."""
    space = variables()
    changed = [space[n].index(c) / (len(space[n]) - 1) for n, c in values.items()]
    latency = 1.2 - 0.9 * float(np.mean(changed[::2]))
    score = Score(
        accuracy=0.9 - 0.3 * float(np.mean(changed)) ** 2,
        latency_ms=latency,
        latency_ms_ci=(latency, latency),
        ratio=latency,
        ratio_ci=(latency, latency),
        size_bytes=round(1e6 - 8e5 * float(np.mean(changed[1::2]))),
        reasons=dict.fromkeys(UNKNOWN, "made up"),
    )
    widths = {n: int(c) for n, c in values.items() if n.startswith("width")}  # what tells one candidate from another
    return Trial(number=-1, role="candidate", candidate=Candidate(widths=widths), outcome=score)


def timed(sampler: str, path: Path, objectives: tuple[str, ...], asks: int) -> dict[str, float]:
    """Milliseconds an ask takes on a record, by the clock and of this process's CPU time, the worst and the median."""
    wall, cpu = [], []
    with opened(sampler, path, objectives) as study:
        study.ask()  # learns the whole record, once
        for _ in range(asks):
            begin, used = time.perf_counter(), time.process_time()
            values = study.ask()
            wall.append(1000 * (time.perf_counter() - begin))
            cpu.append(1000 * (time.process_time() - used))
            assert values is not None
            study.tell(trial(values), values, {})
    return {
        "median_ms": statistics.median(wall),
        "most_ms": max(wall),
        "median_cpu_ms": statistics.median(cpu),
        "most_cpu_ms": max(cpu),
        "asks": asks,
    }


def main() -> int:
    """Time each sampler; 1 where the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ask.json")
    given = parser.parse_args()
    rows = {}
    print(f"{'':26} {'median ms':>10} {'most':>8} {'median CPU ms':>14} {'most':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for objectives in OBJECTIVES:
            record = Path(folder) / f"{len(objectives)}.db"
            fill(record, objectives, given.trials)
            for sampler in SAMPLERS if objectives == OBJECTIVES[0] else SAMPLERS[:1]:
                shutil.copyfile(record, path := Path(folder) / "used.db")
                name = f"{sampler}, {len(objectives)} objectives"
                found = rows[name] = timed(sampler, path, objectives, given.asks if sampler != "tpe" else 3)
                figures = (found[key] for key in ("median_ms", "most_ms", "median_cpu_ms", "most_cpu_ms"))
                print("{:26} {:10.1f} {:8.1f} {:14.1f} {:8.1f}".format(name, *figures), flush=True)
    result = {"trials": given.trials, "variables": len(variables()), "load": os.getloadavg()[0], "samplers": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    met = all(row["median_ms"] <= LIMIT_MS for name, row in rows.items() if name.startswith("surrogate"))
    print(f"limit {LIMIT_MS:g} ms by the clock, median: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())

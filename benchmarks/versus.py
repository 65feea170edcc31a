"""Two sides' files beside each other: measured in one round-robin, scored on test items, with intervals.

A bootstrap draws test items, the same ones for all files, and blocks of the measuring, the same ones for all files,
processes first and blocks within them. What is said of the two sides is computed anew in every draw, so that an
interval holds what both kinds of chance do to it (Efron, 1979).
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.front import hypervolume
from autocompress.core.measurement import Interval, Measurement, separated
from autocompress.device.hosts import Host
from autocompress.remeasure import measure_usable

WORST_DROP, WORST_RATIO = 0.10, 1.0  # what lies beyond does not count: points of accuracy below fp32, latency over it
LEVELS = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.10)
DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class File:
    """A measured and scored file.

    Attributes:
        sides: whose it is; a baseline is of several.
        hits: for each test item whether it is right.
        measurement: against fp32, all files in the same blocks.
        validation: accuracy there, where the side knew it.
    """

    sides: tuple[str, ...]
    name: str
    hits: NDArray[np.bool_]
    measurement: Measurement
    size_bytes: int
    validation: float | None = None

    @property
    def accuracy(self) -> float:
        """On the test items."""
        return float(self.hits.mean())

    def over(self, other: "File") -> tuple[float, Interval]:
        """How many times as fast as another file it is, with its interval."""
        pair = dataclasses.replace(self.measurement, reference=other.measurement.samples)
        low, high = pair.ratio_ci
        return 1 / pair.ratio, (1 / high, 1 / low)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Accuracy and latency over fp32's of each file, `[draws, files]`; the first draw is the data as it is."""

    accuracy: Floats
    ratio: Floats


def artifact_of(path: Path, like: Artifact) -> Artifact:
    """A file as an artifact, with the inputs, outputs and format of another one."""
    return dataclasses.replace(
        like, path=str(path.resolve()), sha256=sha256_of(path), size_bytes=path.stat().st_size, options={}
    )


def measured(
    host: Host, fp32: Artifact, artifacts: Mapping[str, Artifact], inputs: Path, processes: int
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """All of them interleaved in each of so many fresh processes, and what was said of those that fail."""
    names = list(artifacts)
    found, failed = measure_usable(host, fp32, dict(enumerate(artifacts.values())), inputs, processes)
    return {names[i]: m for i, m in found.items()}, {names[i]: why for i, why in failed.items()}


def hits_of(host: Host, artifact: Artifact, inputs: Path, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each item whether the largest of its one output stands at its label."""
    with tempfile.TemporaryDirectory() as folder:
        host.outputs(artifact, inputs, Path(folder))
        (output,) = Path(folder).glob("*.npy")
        found: NDArray[np.bool_] = np.load(output).argmax(1) == labels
        return found


def draw(files: Sequence[File], count: int = DRAWS, seed: int = 0) -> Draws:
    """So many draws, and the data as it is before them."""
    rng = np.random.default_rng(seed)
    hits = np.array([f.hits for f in files], np.float32)
    items = hits.shape[1]
    weights = (rng.multinomial(items, np.full(items, 1 / items)).astype(np.float32) for _ in range(count))
    accuracies = [hits.mean(1), *(hits @ w / items for w in weights)]
    logs = np.array([f.measurement.log_ratios for f in files])
    processes = np.array(files[0].measurement.processes)
    by_process = [logs[:, processes == number] for number in np.unique(processes)]
    ratios = [_ratio(by_process)]
    for _ in range(count):
        chosen = [by_process[i] for i in rng.integers(len(by_process), size=len(by_process))]
        ratios.append(_ratio([part[:, rng.integers(part.shape[1], size=part.shape[1])] for part in chosen]))
    return Draws(accuracy=np.array(accuracies, float), ratio=np.array(ratios))


def _ratio(parts: Sequence[Floats]) -> Floats:
    """Of each file, from its blocks' log ratios in each process, as Measurement.ratio has it."""
    means = []
    for part in parts:
        ordered, cut = np.sort(part, 1), max(1, part.shape[1] // 5) if part.shape[1] >= 4 else 0
        means.append(ordered[:, cut : part.shape[1] - cut].mean(1))
    found: Floats = np.exp(np.mean(means, 0))
    return found


def interval(values: Floats) -> Interval:
    """The 95 % interval of what was computed in every draw but the first."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")  # some may be infinite
    return float(low), float(high)


def volumes(draws: Draws, members: Sequence[int], fp32: int) -> Floats:
    """In each draw the hypervolume of these files, up to WORST_DROP below fp32 and WORST_RATIO."""
    found = []
    for accuracy, ratio in zip(draws.accuracy, draws.ratio, strict=True):
        losses = np.stack([-accuracy[members], ratio[members]], 1)
        found.append(hypervolume(losses, np.array([WORST_DROP - accuracy[fp32], WORST_RATIO])))
    return np.array(found)


def fastest(draws: Draws, members: Sequence[int], fp32: int, drop: float) -> Floats:
    """In each draw the lowest ratio among files at most `drop` below fp32; infinite where there is none."""
    within = draws.accuracy[:, members] >= draws.accuracy[:, [fp32]] - drop - 1e-9
    return np.where(within, draws.ratio[:, members], np.inf).min(1)


def versus(files: Sequence[File], ours: str, theirs: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Hypervolumes of all sides, and whose fastest file is faster at each level of accuracy, against each of theirs."""
    draws = draw(files, seed=seed)
    fp32 = next(i for i, f in enumerate(files) if f.name == "fp32")
    of = {side: [i for i, f in enumerate(files) if side in f.sides] for side in (ours, *theirs)}
    found = {side: volumes(draws, members, fp32) for side, members in of.items()}
    result: dict[str, Any] = {
        "hypervolume": {side: {"value": float(v[0]), "interval": interval(v)} for side, v in found.items()},
        "against": {},
    }
    for side in theirs:
        gained = found[ours] - found[side]
        result["against"][side] = {
            "hypervolume_gain": float(gained[0]),
            "interval": interval(gained),
            "levels": [level(draws, of[ours], of[side], fp32, drop) for drop in LEVELS],
        }
    return result


def level(draws: Draws, ours: Sequence[int], theirs: Sequence[int], fp32: int, drop: float) -> dict[str, Any]:
    """The fastest files of two sides at most `drop` below fp32, and how many times as fast ours is.

    Both sides are judged by the same items and blocks in every draw, and so is their ratio: whose interval lies above 1
    is ahead. `separated` is whether their own intervals do not overlap either, which says less: most of what moves them
    moves both. "same" is where it is one and the same file in every draw, a baseline that both sides have.
    """
    mine, other = (fastest(draws, members, fp32, drop) for members in (ours, theirs))
    sides = [(float(values[0]), interval(values)) for values in (mine, other)]
    with np.errstate(invalid="ignore"):
        faster = np.where(mine == other, 1.0, other / mine)  # neither side may have a file
    low, high = interval(faster)
    same = bool((mine == other).all())
    return {
        "drop": drop,
        "ours": sides[0],
        "theirs": sides[1],
        "faster": (float(faster[0]), (low, high)),
        "separated": separated(sides[0][1], sides[1][1]) or separated(sides[1][1], sides[0][1]),
        "ahead": "same" if same else "ours" if low > 1 else "theirs" if high < 1 else "tie",
    }


def finite(value: Any) -> Any:
    """The same with None where something was infinite, which JSON has no form of."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def show(result: Mapping[str, Any], ours: str) -> None:
    """The tables."""
    for side, row in result["hypervolume"].items():
        print(f"hypervolume {side:>22} {row['value']:.4f} [{row['interval'][0]:.4f}, {row['interval'][1]:.4f}]")
    for side, row in result["against"].items():
        low, high = row["interval"]
        print(f"\n{ours} against {side}: gain {row['hypervolume_gain']:+.4f} [{low:+.4f}, {high:+.4f}]")
        print(f"{'at most below fp32':>20} {ours:>24} {side:>24} {'times as fast':>20}  ahead")
        for at in row["levels"]:
            cells = [f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]" for value, ci in (at["ours"], at["theirs"])]
            faster, (low, high) = at["faster"]
            text = f"{faster:.2f} [{low:.2f}, {high:.2f}]"
            who = {"ours": ours, "theirs": side, "tie": "neither", "same": "same file"}[at["ahead"]]
            print(f"{100 * at['drop']:>13.2f} points {cells[0]:>24} {cells[1]:>24} {text:>20}  {who}")

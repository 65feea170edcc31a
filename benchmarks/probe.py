"""What the probe finds on networks of common sizes, and whether a search is better for it.

`facts`: ResNet-18 and MobileNetV2 at 224x224 on ONNX Runtime. Expected: integers pay, weights stored in 4 bits and
zeros do not, nor do 16-bit activations (which no search offers; the runtime's own quantizer makes that file here), and
widths off the multiples of 16 are mostly no edges. A probe takes less than 3 minutes.

`search`: the built-in task, with and without a probe, with the same trials and seeds. What is compared is the
hypervolume of the final front (accuracy down to 20 points below fp32, latency up to fp32's), measured in fresh
processes; the difference comes with its 95 % interval over seeds.

    python benchmarks/probe.py facts
    python benchmarks/probe.py search --targets cpu-onnxruntime,cpu-openvino,cpu-litert --seeds 5 --trials 30
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

from autocompress import Task, search
from autocompress.bench import few
from autocompress.build import Builder, Stopwatch
from autocompress.config import load_profile
from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.candidate import Candidate
from autocompress.core.front import Front
from autocompress.core.probe import Probe
from autocompress.device.hosts import LocalHost
from autocompress.probe import place, probe, write
from autocompress.run import Run
from autocompress.task import CheckedTask, check_task, load_task
from benchmarks.networks import mbv2, r18

TARGET = "cpu-onnxruntime"
LIMIT_S = 180.0
OFF_16_EDGES = 0.5  # at most this share of the widths that are no multiple of 16
WORST_DROP = 0.20
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom
RESULTS = Path(__file__).parent / "results"


def sixteen_bit_activations(task: CheckedTask) -> float:
    """Latency over fp32's of the file that ONNX Runtime's own tool makes with 16-bit activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            batch = task.batch("calibration", [0])[0]
            self._items: Iterator[Any] = iter([{name: tensor.numpy() for name, tensor in batch.items()}])

        def get_next(self) -> Any:
            return next(self._items, None)

    profile = load_profile(TARGET)
    with tempfile.TemporaryDirectory() as name, LocalHost(profile) as host:
        folder = Path(name)
        (folder / "artifacts").mkdir()
        fp32 = Builder(task, folder, profile).build(Candidate(), Stopwatch()).artifact
        path = folder / "w8a16.onnx"
        quantize_static(
            fp32.path, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt16, weight_type=QuantType.QInt8,
        )  # fmt: skip
        wide = Artifact(
            path=str(path), format="onnx", inputs=fp32.inputs, outputs=fp32.outputs,
            sha256=sha256_of(path), size_bytes=path.stat().st_size,
        )  # fmt: skip
        task.write_split("calibration", folder / "inputs")
        return host.measure([fp32, wide], folder / "inputs")[0].ratio


def whole(found: Probe, choice: str) -> tuple[float, float, float]:
    """Latency over fp32's, with its interval, of a choice on all layers that may have it."""
    tried = [f for f in found.findings if f.choice == choice and f.beside == "fp32" and not isinstance(f.effect, str)]
    effect = max(tried, key=lambda finding: len(finding.layers)).effect
    assert not isinstance(effect, str)
    return effect.ratio, *effect.ratio_ci


def edges(found: Probe) -> dict[str, list[int]]:
    """Of the timed widths on and off the multiples of 16, how many are edges, and how many there are."""
    counts = {"on 16": [0, 0], "off 16": [0, 0]}
    for stair in found.stairs:
        for width in stair.widths[1:]:
            counts["off 16" if width % 16 else "on 16"][1] += 1
            counts["off 16" if width % 16 else "on 16"][0] += width in stair.edges
    return counts


def facts() -> tuple[dict[str, Any], bool]:
    """Probe both networks; the table, and whether what was expected was found."""
    rows: dict[str, Any] = {}
    met = True
    for task in (r18, mbv2):
        found = probe(task, TARGET)
        integer = next(p for p in ("w8a8", "w7a8") if any(f.choice == p for f in found.findings))
        row = {p: whole(found, p) for p in (integer, "w4a8", "w4a32", "w8a32", "sparsity 0.9")}
        counts = edges(found)
        wide = sixteen_bit_activations(few(check_task(task)))
        slower = [f for f in found.findings if f.choice == "fp32" and not isinstance(f.effect, str)]
        row_met = (
            row[integer][2] < 1
            and all(row[p][2] > 1 for p in ("w4a32", "sparsity 0.9"))
            and row["w4a8"][2] > row[integer][1]
            and wide > row[integer][2]
            and counts["off 16"][0] <= OFF_16_EDGES * counts["off 16"][1]
            and found.seconds < LIMIT_S
        )
        met = met and row_met
        rows[task.name] = {
            "seconds": found.seconds, **row, "w8a16 (vendor's tool)": wide, "edges": counts,
            "shapes that cost nothing or less in float": sum(f.effect.ratio_ci[0] < 1 for f in slower),  # type: ignore[union-attr]
            "shapes": len(slower), "left_out": len(found.left_out), "met": row_met, "machine": dict(found.fingerprint),
        }  # fmt: skip
        print(json.dumps({task.name: rows[task.name]}, indent=1))
    return rows, met


def hypervolume(run: Run) -> float:
    """Of the final front, in accuracy × latency over fp32's."""
    front = run.front()
    fp32 = front.baselines["fp32"].score
    assert fp32 is not None
    volume = Front.of(run.final() or run.trials(), ("accuracy", "latency")).hypervolume(
        (fp32.accuracy - WORST_DROP, fp32.latency_ms)
    )
    return volume / (WORST_DROP * fp32.latency_ms)


def one_search(task: str, target: str, space: str, trials: int, seed: int, cache: Path, out: Path) -> dict[str, float]:
    """A search that finds its probe, if there is one, in `cache`."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    run = search(task, target, space=space, trials=trials, seed=seed, out=out)
    model = next(e for line in (run.path / "log.jsonl").open() if (e := json.loads(line))["event"] == "model")
    return {"hypervolume": hypervolume(run), "variables": model["variables"]}


def compared(target: str, given: argparse.Namespace, task: Task) -> dict[str, Any]:
    """The same searches with and without a probe of the target."""
    found = probe(task, target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "probed")
        write(found, place(found))
        pairs = []
        for seed in range(given.seeds):
            pair = {}
            for cache in ("probed", "plain") if seed % 2 else ("plain", "probed"):
                out = folder / f"{cache}-{seed}"
                pair[cache] = one_search(given.task, target, given.space, given.trials, seed, folder / cache, out)
            pairs.append(pair)
            print(target, seed, json.dumps(pair), flush=True)
    return {"probe_s": found.seconds, **differences(pairs), "pairs": pairs, "machine": dict(found.fingerprint)}


def differences(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means, and the mean difference with its 95 % interval."""
    with_it, without = ([pair[name]["hypervolume"] for pair in pairs] for name in ("probed", "plain"))
    gains = [a - b for a, b in zip(with_it, without, strict=True)]
    mean = statistics.fmean(gains)
    half = statistics.stdev(gains) / math.sqrt(len(gains)) * T95[len(gains) - 2]
    return {
        "with": statistics.fmean(with_it), "without": statistics.fmean(without),
        "gain": mean, "gain_low": mean - half, "gain_high": mean + half,
    }  # fmt: skip


def main() -> int:
    """Measure, print, write; 1 where what is claimed does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("facts", "search"))
    parser.add_argument("--task", default="digits")
    parser.add_argument("--space", default="prune-and-quantize")
    parser.add_argument("--targets", default="cpu-onnxruntime,cpu-openvino,cpu-litert")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30)
    given = parser.parse_args()
    if given.question == "facts":
        rows, met = facts()
    else:
        task = load_task(given.task)
        rows = {target: compared(target, given, task) for target in given.targets.split(",")}
        met = sum(row["gain_low"] > 0 for row in rows.values()) >= 2
        rows |= {"trials": given.trials, "space": given.space}
        for target, row in rows.items():
            if isinstance(row, dict):
                print(target, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)})
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"probe-{given.question}.json"
    path.write_text(json.dumps({"met": met, "load_average": os.getloadavg()[0], **rows}, indent=2) + "\n")
    print("met" if met else "NOT met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

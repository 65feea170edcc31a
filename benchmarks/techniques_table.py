"""The table of techniques: latencies of the files that techniques.py and hand_recipe.py made, and all figures together.

`time` measures each file against fp32 and against the runtime's own uniform INT8, interleaved, in fresh processes, and
wants a machine with nothing else to do. `table` prints means over seeds, in Markdown.

    python benchmarks/techniques_table.py time
    python benchmarks/techniques_table.py table
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.measurement import Measurement
from autocompress.core.record import from_json
from autocompress.remeasure import measure_again
from benchmarks.techniques import RESULTS, device_profile, lines, rows

LATENCY, HAND = RESULTS / "techniques-latency.json", RESULTS / "hand_recipe.jsonl"
AT_ONCE = 12  # files in one round-robin


def artifact_of(line: Mapping[str, Any], work: Path) -> Artifact:
    """The file of a line of the results."""
    artifact = from_json(Artifact, line["artifact"])
    return dataclasses.replace(artifact, path=str(work.resolve() / artifact.path))


def hand_files(fp32: Artifact, work: Path) -> Iterator[Artifact]:
    """The files of the hand recipe, which take what fp32 takes."""
    for line in HAND.read_text().splitlines() if HAND.exists() else ():
        for file in json.loads(line)["files"].values():
            path = work.resolve() / file["path"]
            if path.exists():
                yield dataclasses.replace(fp32, path=str(path), sha256=sha256_of(path), size_bytes=file["bytes"])


def time_all(given: argparse.Namespace) -> int:
    """Latency of all files that have none yet, against fp32 and against uniform INT8."""
    known = json.loads(LATENCY.read_text()) if LATENCY.exists() else {}
    all_rows = rows()
    for target in dict.fromkeys(row.target for row in all_rows.values()):
        made = [line for line in lines() if all_rows[line["row"]].target == target]
        files = {(line["row"], line["seed"]): artifact_of(line, given.work) for line in made}
        fp32, int8 = (files[f"{target} baseline: {name}", 0] for name in ("fp32", "uniform INT8"))
        every = list(files.values())
        every += hand_files(fp32, given.work) if target == "cpu-onnxruntime" else ()
        waiting = list({a.sha256: a for a in every if a.sha256 not in known}.values())
        profile, host = device_profile(target)
        with host:
            for start in range(0, len(waiting), AT_ONCE):
                chunk = waiting[start : start + AT_ONCE]
                for what, reference in (("fp32", fp32), ("int8", int8)):
                    inputs = given.work.resolve() / "data" / "validation"
                    found = measure_again(host, reference, chunk, inputs, profile.measure.processes)
                    for artifact, measurement in zip(chunk, found, strict=True):
                        known.setdefault(artifact.sha256, {})[what] = _ratio(measurement)
                LATENCY.write_text(json.dumps(known, indent=1) + "\n")
                print(f"{target}: {start + len(chunk)} of {len(waiting)}, load {os.getloadavg()[0]:.1f}", flush=True)
    return 0


def _ratio(measurement: Measurement) -> dict[str, Any]:
    low, high = measurement.ratio_ci
    return {
        "ratio": round(measurement.ratio, 4), "low": round(low, 4), "high": round(high, 4),
        "reference_ms": round(measurement.reference_ms, 4), "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def table(given: argparse.Namespace) -> int:
    """Print the table, the mean over seeds, in Markdown."""
    latency = json.loads(LATENCY.read_text()) if LATENCY.exists() else {}
    done: dict[str, list[dict[str, Any]]] = {}
    for line in lines():
        line["latency"] = latency.get(line["artifact"]["sha256"])
        done.setdefault(line["row"], []).append(line)
    print("| technique | seeds | test % | of fp32's latency | of INT8's | kB | packed kB | s |")
    print("|---|---|---|---|---|---|---|---|")
    for key, row in rows().items():
        if key in done:
            print(_line(f"{row.section}: {row.name}" + (" (LiteRT)" if "litert" in row.target else ""), done[key]))
    by_hand: dict[float, list[dict[str, Any]]] = {}
    for line in map(json.loads, HAND.read_text().splitlines() if HAND.exists() else ()):
        better = max((line["files"][n] for n in line["files"] if n != "fp32"), key=lambda file: file["validation"])
        spent = sum(line["seconds"][f"{stage}_cpu"] for stage in ("prune", "train", "export", "int8"))
        path = given.work / better["path"]
        sha = sha256_of(path) if path.exists() else ""
        row_like = {"test": better["test"], "bytes": better["bytes"], "packed": None, "cpu_s": spent}
        by_hand.setdefault(line["ratio"], []).append({**row_like, "latency": latency.get(sha)})
    for ratio, found in sorted(by_hand.items()):
        print(_line(f"by hand: {ratio:.0%} cut, two epochs, W8A8", found))
    return 0


def _line(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """One row: means over seeds, the standard deviation of accuracy, and latencies with the outermost interval."""
    accuracy = [100 * line["test"] for line in found]
    spread = f" ± {statistics.stdev(accuracy):.2f}" if len(found) > 1 else ""
    cells = [name, str(len(found)), f"{statistics.fmean(accuracy):.2f}{spread}"]
    for reference in ("fp32", "int8"):
        timed = [line["latency"][reference] for line in found if line["latency"]]
        mean = statistics.fmean(t["ratio"] for t in timed) if timed else None
        low, high = min((t["low"] for t in timed), default=0), max((t["high"] for t in timed), default=0)
        cells.append("" if mean is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
    for name in ("bytes", "packed"):
        counts = [line[name] for line in found if line[name] is not None]
        cells.append(f"{statistics.fmean(counts) / 1000:.0f}" if counts else "")
    return "| " + " | ".join([*cells, f"{statistics.fmean(line['cpu_s'] for line in found):.0f}"]) + " |"


def main() -> int:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("time", "table"))
    parser.add_argument("--work", type=Path, default=Path("runs/techniques"))
    given = parser.parse_args()
    return time_all(given) if given.act == "time" else table(given)


if __name__ == "__main__":
    sys.exit(main())

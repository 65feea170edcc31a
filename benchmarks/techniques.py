"""What each technique gives on a public task, alone and together: accuracy, latency, bytes and seconds of recovery.

The rows stand in techniques.yaml; each is a candidate that the product's own builder makes into a file, in a process of
its own on one thread. Its accuracy is that of the file in its runtime, on validation and on test items, none of which
any technique saw. Then all files are timed against fp32 and against the runtime's own uniform INT8, interleaved, in
fresh processes.

    python benchmarks/hand_recipe.py path/to/fashion_resnet/task.py --threads 1
    python benchmarks/techniques.py run path/to/fashion_resnet/task.py --jobs 2
    python benchmarks/techniques.py time path/to/fashion_resnet/task.py
    python benchmarks/techniques.py table

`run` adds a line of JSON for each row and seed to results/techniques.jsonl and skips those that stand there; a row that
fails says so on stderr and is tried again the next time. `time` wants a machine with nothing else to do.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import yaml
from pydantic import TypeAdapter

from autocompress.build import Builder, Stopwatch
from autocompress.config import load_profile
from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.candidate import Candidate, LayerChoice, parse_precision, parse_sparsity
from autocompress.core.measurement import Measurement
from autocompress.core.profile import Profile
from autocompress.core.recipe import DEFAULT_STAGES, Calibrator, Recipe, Stage
from autocompress.core.record import from_json, to_json
from autocompress.core.space import Layer, Structure
from autocompress.device.local import LocalHost
from autocompress.place import fitted
from autocompress.remeasure import measure_again
from autocompress.scoring import read_outputs
from autocompress.task import CheckedTask, check_task, load_task

if TYPE_CHECKING:
    from torch import Tensor, nn

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LINES, LATENCY, HAND = (RESULTS / name for name in ("techniques.jsonl", "techniques-latency.json", "hand_recipe.jsonl"))
SPLITS = ("validation", "test")
AT_ONCE = 12  # files in one round-robin
FULL_WIDTH = 24  # channels of the model's first stage


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table; see techniques.yaml."""

    section: str
    name: str
    target: str
    precision: Mapping[str, str]
    seeds: int
    steps: int
    vendor: bool = False
    calibrator: Calibrator = "minmax"
    keep: float = 1.0
    widths: Mapping[int, int] = field(default_factory=dict)
    sparsity: float | str = 0.0
    ranks: float = 1.0
    factors: Literal["channel", "spatial"] = "channel"
    skip: tuple[str, ...] = ()
    student: float | None = None
    stages: tuple[Stage, ...] = DEFAULT_STAGES

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's own name, read once

    @property
    def key(self) -> str:
        """Name that no other row has."""
        return f"{self.target} {self.section}: {self.name}"


def rows() -> dict[str, Row]:
    """All rows by key, in the file's order."""
    data = yaml.safe_load((HERE / "techniques.yaml").read_text(encoding="utf-8"))
    found = [TypeAdapter(Row).validate_python({**data["defaults"], **row}) for row in data["rows"]]
    return {row.key: row for row in found}


def candidate(row: Row, seed: int, structure: Structure, profile: Profile) -> Candidate:
    """The candidate of a row. What decides its random numbers is its name: the seed is put into that of a stage."""
    widths = {g.name: row.widths.get(g.width, max(1, round(row.keep * g.width))) for g in structure.groups}
    first = dataclasses.replace(row.stages[0], name=f"{row.stages[0].name} {seed}")
    return Candidate(
        student=row.student,
        widths={} if row.student else {g.name: widths[g.name] for g in structure.groups if widths[g.name] != g.width},
        skipped=row.skip,
        layers={layer.name: choice_of(row, layer, profile) for layer in structure.layers},
        recipe=Recipe(calibrator=row.calibrator, recover_steps=row.steps, stages=(first, *row.stages[1:])),
    )


def choice_of(row: Row, layer: Layer, profile: Profile) -> LayerChoice:
    """What a row says of one layer. Only convolutions larger than 1x1 that also take many channels get a rank."""
    name = [p for glob, p in row.precision.items() if fnmatch.fnmatchcase(layer.name, glob)][-1]
    choice = dataclasses.replace(parse_precision(profile.executable(name)), sparsity=parse_sparsity(row.sparsity))
    if row.ranks == 1 or len(layer.shape) != 4 or layer.shape[2] == 1 or layer.shape[1] == 1:
        return choice
    from autocompress.compress.factorize import full_rank

    rank = max(1, round(row.ranks * full_rank(layer.shape, row.factors)))
    return dataclasses.replace(choice, rank=rank, factors=row.factors)


def task_of(reference: str) -> CheckedTask:
    """The task, with a second teacher, the original that looks into a mirror, and an untrained student."""
    from torch import nn

    class Mirrored(nn.Module):
        def __init__(self, model: "nn.Module") -> None:
            super().__init__()
            self.model = model

        def forward(self, x: "Tensor") -> "Tensor":
            found: Tensor = self.model(x.flip(-1))
            return found

    task = load_task(reference)
    kind: Any = type(task.model())
    return check_task(
        dataclasses.replace(
            task,
            teachers=[lambda: Mirrored(task.model())],
            student=lambda width: kind(round(FULL_WIDTH * width)).eval(),
        )
    )


def device_profile(target: str) -> tuple[Profile, LocalHost]:
    """The profile as far as this machine can do it, and the host."""
    host = LocalHost(load_profile(target))
    profile = fitted(load_profile(target), host.fingerprint().facts)[0]
    return profile, host


def one(row: Row, seed: int, reference: str, work: Path) -> dict[str, Any]:
    """Build a row's file and score it; the line for the results.

    Its packed bytes are those after zlib: what zeros and repeated values save where the format has no form for them.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)  # of the untrained student; the product's own stages have their seeds
    task = task_of(reference)
    profile, host = device_profile(row.target)
    folder = work / re.sub(r"\W+", "-", row.key) / str(seed)
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    with host:
        builder = Builder(task, folder, profile)
        watch, before = Stopwatch(), _cpu_s()
        notes: tuple[str, ...] = ()
        if row.vendor:
            artifact = builder.vendor_int8(watch)
        else:
            built = builder.build(candidate(row, seed, builder.structure, profile), watch)
            artifact, notes = built.artifact, built.notes
        used = _cpu_s() - before
        accuracy = {split: score(task, host, artifact, split, work) for split in SPLITS}
        facts = dict(host.fingerprint().facts)
    packed = len(zlib.compress(Path(artifact.path).read_bytes(), 9))
    artifact = dataclasses.replace(artifact, path=str(Path(artifact.path).relative_to(work)))
    return {
        "row": row.key, "seed": seed, **accuracy, "bytes": artifact.size_bytes,
        "packed": packed, "seconds": {k: round(s, 2) for k, s in watch.seconds.items()},
        "cpu_s": round(used, 2), "notes": notes, "artifact": to_json(artifact), "cpu": facts["cpu_model"],
    }  # fmt: skip


def score(task: CheckedTask, host: LocalHost, artifact: Artifact, split: str, work: Path) -> float:
    """The task's metric of a file in its runtime over a split."""
    with tempfile.TemporaryDirectory() as out:
        host.outputs(artifact, work / "data" / split, Path(out))
        outputs = task.unflatten(read_outputs(Path(out), task.outputs.names))
        return task.metric(outputs, task.targets(split))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def lines() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def run(given: argparse.Namespace) -> int:
    """All rows that match and are not done, so many at once; 1 where one of them fails."""
    done = {(line["row"], line["seed"]) for line in lines()}
    wanted = [
        (row.key, seed)
        for seed in range(given.seeds)
        for row in rows().values()
        if seed < row.seeds and fnmatch.fnmatchcase(row.key, given.only) and (row.key, seed) not in done
    ]
    task = check_task(load_task(given.task))
    for split in SPLITS:
        task.write_split(split, given.work / "data" / split)

    def alone(job: tuple[str, int]) -> bool:
        command = [sys.executable, __file__, "one", given.task, *map(str, job), "--work", str(given.work)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            last = made.stderr.strip().splitlines()[-1:] or [f"exit {made.returncode}"]
            print(f"FAILED {job[0]}, seed {job[1]}: {last[0]}", file=sys.stderr, flush=True)
            return False
        line = made.stdout.strip().splitlines()[-1]
        with LINES.open("a") as file:
            file.write(line + "\n")
        found = json.loads(line)
        print(f"{job[0]}, seed {job[1]}: test {100 * found['test']:.2f}, {found['cpu_s']:.0f} s", flush=True)
        return True

    with ThreadPoolExecutor(given.jobs) as pool:
        return 0 if all(list(pool.map(alone, wanted))) else 1


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
        spent = sum(s for name, s in line["seconds"].items() if name in ("prune", "train", "export", "int8"))
        path = given.work / better["path"]
        sha = sha256_of(path) if path.exists() else ""
        row_like = {"test": better["test"], "bytes": better["bytes"], "packed": 0, "cpu_s": spent}
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
    cells += [f"{statistics.fmean(line[n] for line in found) / 1000:.0f}" for n in ("bytes", "packed")]
    return "| " + " | ".join([*cells, f"{statistics.fmean(line['cpu_s'] for line in found):.0f}"]) + " |"


def main() -> int:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, act in (("run", run), ("one", None), ("time", time_all), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(act=act)
        command.add_argument("--work", type=Path, default=Path("runs/techniques"))
        if name != "table":
            command.add_argument("task", help="reference of the public task")
        if name == "run":
            command.add_argument("--only", default="*", help="glob over `target section: name`")
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--jobs", type=int, default=1)
        if name == "one":
            command.add_argument("row")
            command.add_argument("seed", type=int)
    given = parser.parse_args()
    if given.act is not None:
        return int(given.act(given))
    print(json.dumps(one(rows()[given.row], given.seed, given.task, given.work.resolve())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What each technique gives on a public task, alone and together: accuracy, latency, bytes and seconds of recovery.

The rows stand in techniques.yaml; each is a candidate that the product's own builder makes into a file, in a process of
its own on one thread. Its accuracy is that of the file in its runtime, on validation and on test items, none of which
any technique saw. techniques_table.py times the files and shows all figures together.

    python benchmarks/techniques.py run path/to/fashion_resnet/task.py --jobs 2

A line of JSON for each row and seed is added to results/techniques.jsonl, and those that stand there are skipped; a row
that fails says so on stderr and is tried again the next time.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
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
from autocompress.core.artifact import Artifact
from autocompress.core.candidate import BLOCK, Candidate, LayerChoice, parse_precision, parse_sparsity
from autocompress.core.profile import Profile
from autocompress.core.recipe import DEFAULT_STAGES, Calibrator, Recipe, Stage
from autocompress.core.record import to_json
from autocompress.core.space import Layer, Structure
from autocompress.device.local import LocalHost
from autocompress.place import fitted
from autocompress.scoring import read_outputs
from autocompress.task import CheckedTask, check_task, load_task

if TYPE_CHECKING:
    from torch import Tensor, nn

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LINES = RESULTS / "techniques.jsonl"
SPLITS = ("validation", "test")
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
    answered: bool = False

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
    """What a row says of one layer. Patterns of zeros need enough channels; large convolutions of many get a rank."""
    name = [p for glob, p in row.precision.items() if fnmatch.fnmatchcase(layer.name, glob)][-1]
    choice = parse_precision(profile.executable(name))
    if not (isinstance(row.sparsity, str) and layer.shape[1] % BLOCK):
        choice = dataclasses.replace(choice, sparsity=parse_sparsity(row.sparsity))
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
        if row.answered:
            builder.build(candidate(row, seed, builder.structure, profile), Stopwatch())
            shutil.rmtree(folder / "weights")
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


def main() -> int:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name in ("run", "one"):
        command = commands.add_parser(name)
        command.set_defaults(name=name)
        command.add_argument("task", help="reference of the public task")
        command.add_argument("--work", type=Path, default=Path("runs/techniques"))
        if name == "run":
            command.add_argument("--only", default="*", help="glob over `target section: name`")
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--jobs", type=int, default=1)
        else:
            command.add_argument("row")
            command.add_argument("seed", type=int)
    given = parser.parse_args()
    if given.name == "run":
        return run(given)
    print(json.dumps(one(rows()[given.row], given.seed, given.task, given.work.resolve())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

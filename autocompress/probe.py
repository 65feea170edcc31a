"""Measure which choices pay for a model on a device, before a search spends trials on those that never do.

The record is a YAML file in the user's cache. A search of the same task and target on the same device takes it into
its run, where it stays: what is searched does not change while a search goes on.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from autocompress.bench import Bench, few
from autocompress.choices import Choices
from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.core.probe import Payoff, Probe, subject
from autocompress.core.profile import Profile
from autocompress.core.record import dump, load
from autocompress.core.space import Structure
from autocompress.run import Run, utc_now

if TYPE_CHECKING:
    from autocompress.progress import Progress
    from autocompress.task import CheckedTask, Task

SCHEMA = 1
SECONDS = 140.0
FOR_CHOICES = 0.6  # of the time: what is left is for widths


def probe(
    task: "Task | str",
    target: Profile | Path | str,
    *,
    on: str | None = None,
    seconds: float = SECONDS,
    progress: "Progress | None" = None,
) -> Probe:
    """Measure which choices pay for a task's model on a target.

    Args:
        task, target, on: as `search` takes them.
        seconds: time after which nothing new is begun.
        progress: is told what goes on.

    Raises:
        InputError: a task or profile is not what it must be.
        TargetError: target or runtime is not usable here, or fp32 fails on it.
    """
    from autocompress.config import load_profile
    from autocompress.device.hosts import open_host
    from autocompress.place import check_runtime, fitted, placed
    from autocompress.progress import Silent
    from autocompress.stairs import Stairs
    from autocompress.task import check_task, load_task

    started = time.monotonic()
    shown = progress or Silent()
    profile = placed(target if isinstance(target, Profile) else load_profile(str(target)), on)
    check_runtime(profile)
    shown.stage("preparing the model")
    checked = check_task(load_task(task) if isinstance(task, str) else task)
    small = few(checked)
    with (
        tempfile.TemporaryDirectory(prefix="autocompress-probe-") as name,
        open_host(profile.host, _patient(profile)) as host,
    ):
        facts = host.fingerprint().facts
        profile, _ = fitted(profile, facts)
        try:
            bench = Bench(small, profile, host, Path(name) / "whole")
            choices = Choices(small, bench, shown)
            choices.measure(started + seconds * FOR_CHOICES)
            shown.stage("probing widths")
            fastest = list(choices.extremes().items())[-1]
            stairs, left = Stairs(small, bench, host, Path(name), *fastest).measure(started + seconds)
        except StageError as error:
            raise TargetError(f"fp32 failed in stage {error.stage!r}: {error}") from error
    return Probe(
        task=checked.task.name,
        target=profile.name,
        subject=subject_of(checked, bench.builder.structure, profile),
        fingerprint=dict(facts),
        created=utc_now(),
        seconds=time.monotonic() - started,
        verdicts=tuple(choices.verdicts),
        stairs=tuple(stairs),
        findings=tuple(choices.findings),
        left_out=(*choices.left_out, *left),
    )


def _patient(profile: Profile) -> Profile:
    """A step of a stair is less than a candidate of a search is told apart by."""
    plan = profile.measure
    longer = replace(plan, target_ci=plan.target_ci / 2, max_duration_s=3 * plan.max_duration_s)
    return replace(profile, measure=longer)


def subject_of(task: "CheckedTask", structure: Structure, profile: Profile) -> str:
    """Digest of what a probe is about."""
    item = task.batch("calibration", [0])[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in item.items()}
    return subject(structure, shapes, profile)


def place(probe: Probe) -> Path:
    """Where a probe is kept: in the user's cache, by task, target and device."""
    return _place(probe.task, probe.target, probe.fingerprint)


def _place(task: str, target: str, fingerprint: Mapping[str, str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()
    return cache / "autocompress" / "probes" / f"{task}-{target}-{digest[:12]}.yaml"


def cached(task: str, target: str, fingerprint: Mapping[str, str], about: str) -> Probe | None:
    """The probe in the user's cache of this task, target and device, None where there is none of this subject.

    Raises:
        InputError: its file cannot be read.
    """
    path = _place(task, target, fingerprint)
    found = read(path) if path.exists() else None
    return found if found is not None and found.subject == about else None


def payoff_of(run: Run, about: str, fingerprint: Mapping[str, str]) -> Payoff | None:
    """What a run searches by: its own copy of a probe, made before its first trial, None where there is none.

    Args:
        about: the subject of the run's search; a probe of another one is passed over.
        fingerprint: of its device.

    Raises:
        InputError: a probe's file cannot be read.
    """
    kept = run.path / "probe.yaml"
    if not kept.exists() and not run.trials():
        found = cached(run.config.task_name, run.config.profile.name, fingerprint, about)
        if found is not None:
            write(found, kept)
    if not kept.exists():
        return None
    config = run.config
    limited = config.limits.max_size_mb is not None or config.limits.max_memory_mb is not None
    return Payoff(probe=read(kept), size_counts=limited or not {"accuracy", "latency"}.issuperset(config.objectives))


def write(probe: Probe, path: Path) -> None:
    """Write a probe; a reader sees the old file or the new one."""
    head = f"# Which choices pay for {probe.task} on {probe.target}, measured {probe.created}.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = yaml.safe_dump(dump(probe, SCHEMA), sort_keys=False, allow_unicode=True, width=120)
    temporary.write_text(head + text, encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> Probe:
    """The probe in a file.

    Raises:
        InputError: it is none, or of a later version.
    """
    try:
        return load(Probe, yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMA)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a probe: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error

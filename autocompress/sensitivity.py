"""How sensitive a model is to each choice of a search space: for people, and for the first proposals of a search."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.core.candidate import parse_precision
from autocompress.core.probe import Effect as Measured
from autocompress.core.probe import Probe
from autocompress.core.profile import Profile
from autocompress.core.sensitivity import Sensitivity
from autocompress.core.space import Space, SpaceRules, Values

if TYPE_CHECKING:
    from autocompress.build import Builder
    from autocompress.progress import Progress
    from autocompress.task import CheckedTask, Task

SECONDS = 120.0
TOLD_EVERY_S = 5.0


def sensitivity(
    task: "Task | str",
    target: Profile | Path | str,
    *,
    space: SpaceRules | Path | str = "default",
    on: str | None = None,
    seconds: float = SECONDS,
    progress: "Progress | None" = None,
) -> Sensitivity:
    """Probe each choice of a space by itself on a task's original model. Nothing is measured on the device.

    Where the device was probed for this model before (`autocompress profile probe`), integer layers cost what that
    measured.

    Args:
        task, target, space, on: as `search` takes them.
        seconds: time after which no probe is begun.
        progress: is told what goes on.

    Raises:
        InputError: a task, profile or space is not what it must be.
        TargetError: target or runtime is not usable here.
    """
    from autocompress.build import Builder
    from autocompress.config import load_profile, load_space
    from autocompress.device.hosts import open_host
    from autocompress.place import check_runtime, fitted, placed
    from autocompress.probe import cached, subject_of
    from autocompress.progress import Silent
    from autocompress.task import check_task, load_task

    shown = progress or Silent()
    profile = placed(target if isinstance(target, Profile) else load_profile(str(target)), on)
    rules = space if isinstance(space, SpaceRules) else load_space(str(space))
    check_runtime(profile)
    shown.stage("preparing the model")
    checked = check_task(load_task(task) if isinstance(task, str) else task)
    with open_host(profile.host, profile) as host:
        facts = host.fingerprint().facts
    profile, _ = fitted(profile, facts)
    with tempfile.TemporaryDirectory(prefix="autocompress-sensitivity-") as name:
        builder = Builder(checked, Path(name), profile)
        resolved = rules.resolve(builder.structure, profile, has_student=checked.task.student is not None)
        probe = cached(checked.task.name, profile.name, facts, subject_of(checked, builder.structure, profile))
        return probe_sensitivity(
            builder,
            resolved,
            task=checked,
            target=profile.name,
            int8_ratio=None if probe is None else int8_ratio_of(probe),
            seconds=seconds,
            progress=shown,
        )


def probe_sensitivity(
    builder: "Builder",
    space: Space,
    *,
    task: "CheckedTask",
    target: str,
    int8_ratio: float | None = None,
    seconds: float = SECONDS,
    progress: "Progress | None" = None,
) -> Sensitivity:
    """Probe the variables of `space` on the model of a search's builder.

    Args:
        int8_ratio: measured latency of uniform INT8 over fp32's, None where it is not known.
        seconds: time after which no probe is begun; what was not probed is left out with that reason.
        progress: is told now and then.
    """
    from autocompress.compress.sensitivity import measure
    from autocompress.progress import Silent

    shown, told = progress or Silent(), time.monotonic()

    def tell(done: int, planned: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TOLD_EVERY_S:
            told = time.monotonic()
            shown.stage(f"probing sensitivities: {done} of {planned}")

    shown.stage("probing sensitivities")
    return measure(
        space,
        builder.setting,
        task=task.task.name,
        target=target,
        int8_ratio=int8_ratio,
        seconds=seconds,
        progress=tell,
    )


def seeds_by(sensitivity: Sensitivity, space: Space, count: int) -> list[Values]:
    """At most `count` values of a space's variables along the front that the sensitivities predict."""
    from autocompress.optimize.seeds import sweep

    blocks = {layer: block for block, members in space.members.items() for layer in members}
    return sweep(sensitivity.effects, space.variables, count, blocks=blocks)


def int8_ratio_of(probe: Probe) -> float | None:
    """Latency of the model with most of its layers in 8-bit integers over fp32's, None where no probe built that."""
    whole = [
        (len(finding.layers), finding.effect.ratio)
        for finding in probe.findings
        if isinstance(finding.effect, Measured) and finding.beside == "fp32" and _is_integer(finding.choice)
    ]
    return max(whole)[1] if whole else None


def _is_integer(choice: str) -> bool:
    if not choice.startswith("w") or " " in choice:
        return False
    precision = parse_precision(choice)
    return precision.kernel == "int8" and precision.weight_bits >= 7

"""Peak memory and energy of a file, each a number or the reason why there is none."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from autocompress.core.artifact import Artifact
from autocompress.device.hosts import Host

NOT_IN_SEARCH = "measured for the finished front only"


def read_meters(
    host: Host,
    artifact: Artifact,
    inputs: Path,
    *,
    memory: bool,
    energy: bool,
    watch: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, Any]:
    """`peak_memory_bytes` and `energy_mj`, each None with its reason in `reasons` where it is not wanted or not known.

    Raises:
        StageError: peak memory is wanted, and the file fails.
    """
    figures: dict[str, Any] = {"peak_memory_bytes": None, "energy_mj": None, "reasons": {}}
    if memory:
        with watch("memory"):
            figures["peak_memory_bytes"] = host.peak_memory(artifact, inputs)
    else:
        figures["reasons"]["peak_memory_bytes"] = f"{NOT_IN_SEARCH}, unless memory is an objective or limited"
    if energy:
        with watch("energy"):
            found = host.energy(artifact, inputs)
        if isinstance(found, str):
            figures["reasons"]["energy_mj"] = found
        else:
            figures["energy_mj"] = found
    else:
        figures["reasons"]["energy_mj"] = f"{NOT_IN_SEARCH}, unless energy is an objective"
    return figures

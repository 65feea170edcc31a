"""What a runtime must do, and the table of those known.

A backend is one file plus one line in `RUNTIMES`; nothing is imported before it is asked for.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import InputError, TargetError, unknown

Array = NDArray[Any]
Options = Mapping[str, str | int | float | bool]

RUNTIMES: Mapping[str, str] = {
    "onnxruntime": "autocompress.device.onnxruntime:OnnxRuntime",
    "openvino": "autocompress.device.openvino:OpenVino",
    "litert": "autocompress.device.litert:LiteRt",
    "tensorrt": "autocompress.device.tensorrt:TensorRt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a runtime works here.

    Attributes:
        version: of the runtime, None when it is not installed.
        reason: one sentence why it is not usable, empty when it is.
        install: the command that installs it.
    """

    usable: bool
    version: str | None
    reason: str
    install: str


class Session(Protocol):
    """A loaded model.

    `run` and the function that `bind` returns are synchronous: when they return, the outputs are computed and stay
    as they are. Inputs go by name, with the batch dimension; each must have the dtype and the rank the model declares
    and its fixed sizes, else InputError names the input, what came and what is expected.
    After `close` nothing but `close` may be called; closing twice is harmless.
    """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the model's order.

        Raises:
            InputError: the inputs do not fit the model.
            StageError: the runtime failed; stage "measure".
        """

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], Mapping[str, Array]]:
        """`run` with these inputs, checked now and not again: what is timed holds the runtime's work only."""

    def executed_precision(self) -> Mapping[str, str] | None:
        """What really ran in the last `run`, read back from the runtime: node name → "int8", "fp32", "fp16", …

        Only nodes that compute with weights or contract tensors are named, by their name in the file.
        None when the runtime does not tell. Raises InputError before the first `run`.
        """

    def close(self) -> None:
        """Give everything back."""


class Runtime(Protocol):
    """A vendor's runtime in this process. Made without arguments, and making one imports nothing heavy."""

    def available(self) -> Availability:
        """Whether it is usable here; never raises."""

    def load(self, path: Path, options: Options) -> Session:
        """A session on the file at `path`. Every runtime takes the option `threads`.

        Raises:
            InputError: an option that the runtime does not know, or a value it does not take.
            StageError: the file does not load; stage "load".
            TargetError: the runtime is not installed.
        """


@runtime_checkable
class TellsFacts(Protocol):
    """A runtime whose device has facts of its own for the fingerprint, beside the machine's."""

    def facts(self, options: Options) -> Mapping[str, str]:
        """Facts of the device these options name: its name, "float_precisions" (of fp32 bf16 fp16, with spaces), …

        Raises:
            TargetError: the device is not usable here.
        """


@runtime_checkable
class TellsDiagnosis(Protocol):
    """A session that knows of its file why it may be slower than it could be."""

    def diagnosis(self) -> Mapping[str, str]:
        """What was noticed, by name: "delegates" (pieces that the graph is cut into), …"""


def get_runtime(name: str) -> Runtime:
    """The runtime of that name in the table, or of one's own as `module:Class`; usable or not, which it tells itself.

    Raises:
        TargetError: the name is not known.
    """
    module, _, attribute = RUNTIMES.get(name, name).partition(":")
    if not attribute:
        raise TargetError(unknown("runtime", name, RUNTIMES))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise TargetError(f"runtime {name!r}: there is no module {module!r}") from error
    except AttributeError as error:
        raise TargetError(f"runtime {name!r}: module {module!r} has no {attribute!r}") from error
    return cast(Runtime, found())


def check_inputs(
    given: Mapping[str, Array], expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]
) -> None:
    """Raise InputError unless `given` has exactly the inputs `expected`: name → dtype and shape, None a free size."""
    for name in given:
        if name not in expected:
            raise InputError(unknown("model input", name, expected))
    for name, (dtype, shape) in expected.items():
        if name not in given:
            raise InputError(f"model input {name!r} is missing, got {', '.join(given) or 'none'}")
        value = given[name]
        if value.dtype != dtype:
            raise InputError(f"model input {name!r} must be {dtype}, got {value.dtype}")
        fits = len(value.shape) == len(shape) and all(
            want is None or want == got for want, got in zip(shape, value.shape, strict=True)
        )
        if not fits:
            free = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
            raise InputError(f"model input {name!r} must have shape {free}, got {value.shape}")

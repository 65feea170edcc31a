"""What `predict.py` needs of LiteRT, which is all it needs beside numpy; the older tflite-runtime does as well."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from ai_edge_litert import interpreter as litert  # type: ignore[import-untyped]  # it has no stubs
except ModuleNotFoundError:
    from tflite_runtime import interpreter as litert  # type: ignore[import-not-found]


def open_model(
    path: Path, options: Mapping[str, Any], outputs: Sequence[str]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from arrays by input name to arrays by output name; the names are those of the file's signature."""
    kinds = litert.OpResolverType
    interpreter = litert.Interpreter(
        model_path=str(path),
        num_threads=int(options["threads"]),
        experimental_op_resolver_type=(
            kinds.AUTO if options.get("xnnpack", True) else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        ),
    )
    signature = next(iter(interpreter.get_signature_list()))
    runner = interpreter.get_signature_runner(signature)

    types = {name: details["dtype"] for name, details in runner.get_input_details().items()}

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = runner(**{name: _fitting(name, value, types.get(name)) for name, value in inputs.items()})
        return {name: found[name] for name in outputs}

    return run


def _fitting(name: str, value: Any, wanted: Any) -> Any:
    """Integers in the model's own type, where all of them fit: the converter makes 32 bits of 64."""
    if wanted is None or value.dtype == wanted or not all(np.issubdtype(t, np.integer) for t in (value.dtype, wanted)):
        return value
    limits = np.iinfo(wanted)
    if value.size and (value.min() < limits.min or value.max() > limits.max):
        raise ValueError(
            f"input {name!r} is {np.dtype(wanted)} in the model, and has values from {value.min()} to {value.max()}"
        )
    return value.astype(wanted)

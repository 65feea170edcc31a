"""What `predict.py` needs of LiteRT, which is all it needs beside numpy; the older tflite-runtime does as well."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = runner(**inputs)
        return {name: found[name] for name in outputs}

    return run

"""Run this package's model: `python predict.py inputs.npz [outputs.npz]`. Needs only numpy and the package's runtime.

`inputs.npz` holds one array for each input of the model, by name, with items along the first axis.
From Python: `from predict import load, predict`.
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Model:
    """A loaded model: `run` takes one batch; `batch` is its size, None for any."""

    run: Callable[[Arrays], dict[str, NDArray[Any]]]
    inputs: tuple[str, ...]
    batch: int | None


def load(folder: Path = HERE, *, baseline: bool = False) -> Model:
    """The package's model as it was measured; `baseline` takes the fp32 model it can be rolled back to.

    Of a cascade both models are loaded, and the large one runs the items of which the small one is unsure.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    profile, cascade = manifest["profile"], manifest.get("cascade")
    if baseline or cascade is None:
        return _load(folder, profile, manifest["baseline" if baseline else "trial"]["artifact"])
    small, large = (_load(folder, profile, cascade[name]["artifact"]) for name in ("small", "large"))
    join = importlib.import_module("predict_cascade").cascaded  # the file beside this one
    run = functools.partial(join, small=small.run, large=large.run, **cascade["rule"])
    return replace(small, run=lambda inputs: run(inputs)[0], batch=small.batch or large.batch)


def _load(folder: Path, profile: Mapping[str, Any], artifact: Mapping[str, Any]) -> Model:
    options = {**profile["options"], "threads": profile["measure"]["threads"], **artifact.get("options", {})}
    runtime = importlib.import_module(f"predict_{profile['runtime']}")  # the file beside this one
    run = runtime.open_model(folder / artifact["path"], options, [spec["name"] for spec in artifact["outputs"]])
    fixed = [spec["shape"][0] for spec in artifact["inputs"] if spec["shape"] and spec["shape"][0] is not None]
    return Model(run=run, inputs=tuple(spec["name"] for spec in artifact["inputs"]), batch=fixed[0] if fixed else None)


def predict(model: Model, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Outputs by name for a batch of items; piece by piece where the model's batch size is fixed."""
    if set(inputs) != set(model.inputs):
        raise ValueError(f"the model's inputs are {', '.join(model.inputs)}, got {', '.join(inputs) or 'none'}")
    counts = {len(array) for array in inputs.values()}
    if len(counts) != 1:
        raise ValueError(f"all inputs must have the same number of items, got {sorted(counts)}")
    count = counts.pop()
    size = model.batch or count
    if count == 0 or count % size:
        raise ValueError(f"the number of items must be a multiple of {model.batch or 1}, got {count}")
    batches = [{name: array[i : i + size] for name, array in inputs.items()} for i in range(0, count, size)]
    parts = [model.run({name: np.ascontiguousarray(array) for name, array in batch.items()}) for batch in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def main(arguments: list[str]) -> int:
    """Read inputs, predict, say what came out, and write it where a second file is named."""
    if len(arguments) not in (1, 2):
        print("usage: python predict.py inputs.npz [outputs.npz]", file=sys.stderr)
        return 2
    try:
        with np.load(arguments[0], allow_pickle=False) as file:
            outputs = predict(load(), dict(file))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, array in outputs.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    if len(arguments) == 2:
        np.savez(arguments[1], **outputs)  # type: ignore[arg-type]  # the stub takes ** for its own flag
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

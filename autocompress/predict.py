"""Run this package's model: `python predict.py inputs.npz [outputs.npz]`. Needs only numpy and onnxruntime.

`inputs.npz` holds one array for each input of the model, by name, with items along the first axis.
From Python: `from predict import load, predict`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def load(folder: Path = HERE, *, baseline: bool = False) -> Any:
    """A session on the package's model; `baseline` takes the fp32 model it can be rolled back to."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = manifest["profile"]["measure"]["threads"]
    artifact = manifest["baseline" if baseline else "trial"]["artifact"]
    return onnxruntime.InferenceSession(
        str(folder / artifact["path"]), sess_options=options, providers=["CPUExecutionProvider"]
    )


def predict(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name for a batch of items; item by item where the model's batch size is fixed."""
    expected = {value.name: value for value in session.get_inputs()}
    if set(inputs) != set(expected):
        raise ValueError(f"the model's inputs are {', '.join(expected)}, got {', '.join(inputs) or 'none'}")
    counts = {len(array) for array in inputs.values()}
    if len(counts) != 1:
        raise ValueError(f"all inputs must have the same number of items, got {sorted(counts)}")
    names = [value.name for value in session.get_outputs()]
    if not any(isinstance(value.shape[0], int) for value in expected.values()):
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    rows = [session.run(names, {n: array[i : i + 1] for n, array in inputs.items()}) for i in range(counts.pop())]
    return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(names)}


def main(arguments: list[str]) -> int:
    """Read inputs, predict, say what came out, and write it where a second file is named."""
    if len(arguments) not in (1, 2):
        print("usage: python predict.py inputs.npz [outputs.npz]", file=sys.stderr)
        return 2
    try:
        with np.load(arguments[0], allow_pickle=False) as file:
            outputs = predict(load(), dict(file))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, array in outputs.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
    if len(arguments) == 2:
        np.savez(arguments[1], **outputs)  # type: ignore[arg-type]  # the stub takes ** for its own flag
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

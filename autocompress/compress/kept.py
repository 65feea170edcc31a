"""Compressed models on disk: weights, what was learned, and what was reached, in one safetensors file."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autocompress.compress.apply import Compressed, Setting, rebuilt
from autocompress.compress.quantize import Learned
from autocompress.core.candidate import Candidate
from autocompress.core.errors import StageError
from autocompress.core.record import from_json, to_json

_WEIGHT, _SCALE, _RANGE, _OUTPUT = "weight:", "scale:", "range:", "output:"


def write(path: Path, made: Compressed) -> None:
    """Write under another name first: what stands under `path` is whole. Its fallback lies beside it."""
    if made.fallback is not None:
        write(_fallback(path), made.fallback)
    tensors = {f"{_WEIGHT}{name}": tensor.clone().contiguous() for name, tensor in made.model.state_dict().items()}
    tensors |= {f"{_SCALE}{name}": torch.from_numpy(scale.copy()) for name, scale in made.learned.scales.items()}
    tensors |= {f"{_RANGE}{n}": torch.tensor(r, dtype=torch.float64) for n, r in made.learned.inputs.items()}
    tensors |= {f"{_OUTPUT}{i}": torch.from_numpy(array.copy()) for i, array in enumerate(made.learned.simulated)}
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, temporary, {"done": json.dumps(to_json(made.done)), "notes": json.dumps(made.notes)})
    temporary.replace(path)


def read(path: Path, setting: Setting) -> Compressed:
    """What `write` wrote.

    Raises:
        StageError: the file is not that, or was made of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        done, notes = from_json(Candidate, json.loads(told["done"])), tuple(json.loads(told["notes"]))
        weights = {name.removeprefix(_WEIGHT): t for name, t in tensors.items() if name.startswith(_WEIGHT)}
        model = rebuilt(done, setting, weights)
    except Exception as error:  # safetensors, JSON and torch each have their own; the way out is one
        raise StageError("compress", f"{path} cannot be used ({error}): remove it, and it is made again") from error
    scales = {name.removeprefix(_SCALE): t.numpy() for name, t in tensors.items() if name.startswith(_SCALE)}
    ranges = {
        name.removeprefix(_RANGE): (float(t[0]), float(t[1])) for name, t in tensors.items() if name.startswith(_RANGE)
    }
    return Compressed(
        model=model,
        learned=Learned(
            scales={n: s.astype(np.float32) for n, s in scales.items()},
            inputs=ranges,
            simulated=tuple(t.numpy() for n, t in sorted(tensors.items()) if n.startswith(_OUTPUT)),
        ),
        done=done,
        notes=notes,
        fallback=read(_fallback(path), setting) if _fallback(path).exists() else None,
    )


def _fallback(path: Path) -> Path:
    return path.with_suffix(f".fallback{path.suffix}")

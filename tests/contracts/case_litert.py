"""LiteRT."""

from pathlib import Path

import numpy as np

from autocompress.device.litert import LiteRt
from tests.contracts.cases import Case, rows
from tests.tflite_files import MIXED_PRECISIONS, write_linear, write_mixed


def case(folder: Path) -> Case:
    """One FULLY_CONNECTED; and integer and float layers in turn."""
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    return Case(
        runtime=LiteRt(),
        path=write_linear(folder / "linear.tflite", weight, bias),
        inputs={"input": rows()},
        outputs={"output": rows() @ weight + bias},
        mixed=write_mixed(folder / "mixed.tflite"),
        mixed_inputs={"input": rng.normal(size=(1, 8, 8, 3)).astype(np.float32)},
        executed=MIXED_PRECISIONS,
    )

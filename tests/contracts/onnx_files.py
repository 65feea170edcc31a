"""The models of the runtimes that load ONNX."""

from pathlib import Path

import numpy as np

from autocompress.device.runtime import Runtime
from tests.contracts.cases import Case, rows
from tests.models import MIXED_PRECISIONS, write_linear, write_mixed


def onnx_case(runtime: Runtime, folder: Path) -> Case:
    """One Gemm; and integer and float layers in turn."""
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    return Case(
        runtime=runtime,
        path=write_linear(folder / "linear.onnx", weight, bias),
        inputs={"input": rows()},
        outputs={"output": rows() @ weight + bias},
        mixed=write_mixed(folder / "mixed.onnx"),
        mixed_inputs={"input": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)},
        executed=MIXED_PRECISIONS,
    )

"""What `predict.py` needs of ONNX Runtime, which is all it needs beside numpy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

# Option `provider` → what computes, and what takes over where it cannot.
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


def open_model(
    path: Path, options: Mapping[str, Any], outputs: Sequence[str]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from arrays by input name to arrays by output name."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads = int(options["threads"])
    spinning = options.get("spinning", threads > 1)
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if options.get("optimization") == "none":
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = PROVIDERS[str(options.get("provider", "cpu"))]
    session = onnxruntime.InferenceSession(str(path), sess_options=settings, providers=providers)
    return lambda inputs: dict(zip(outputs, session.run(list(outputs), dict(inputs)), strict=True))

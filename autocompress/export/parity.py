"""Does the file compute what the model computes? Checked in ONNX Runtime, on the host, before a file is scored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.extras import require

Arrays = Sequence[NDArray[np.generic]]
FLOAT_TOLERANCE = 1e-3  # of the largest output; exact exports differ by about 1e-6
INT8_SQNR_DB = 10.0  # optimised against unoptimised: a wrong fusion gives noise, rounding gives 20 dB and more


def run_onnx(model: bytes, feeds: Mapping[str, NDArray[np.generic]], *, optimise: bool = True) -> list[NDArray[Any]]:
    """Outputs of a model file's bytes, in order.

    Raises:
        StageError: ONNX Runtime refuses the file or fails on it.
    """
    ort = require("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feeds)))
    except Exception as error:  # ONNX Runtime raises classes of its own for each status code
        raise StageError("export", f"ONNX Runtime fails on the exported graph: {_first_line(error)}") from error


def float_difference(got: Arrays, wanted: Arrays) -> float:
    """Largest difference over the largest wanted magnitude; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    for g, w in zip(got, wanted, strict=True):
        if g.shape != w.shape or not np.isfinite(g).all():
            return float("inf")
        scale = max(float(np.abs(w).max(initial=0)), 1e-6)
        worst = max(worst, float(np.abs(g.astype(np.float64) - w.astype(np.float64)).max(initial=0)) / scale)
    return worst


def check_optimised(model: bytes, feeds: Mapping[str, NDArray[np.generic]]) -> float:
    """Signal-to-noise ratio, dB, of optimised against unoptimised outputs (onnxruntime#24711 shows why).

    Raises:
        StageError: they disagree.
    """
    fast, plain = run_onnx(model, feeds), run_onnx(model, feeds, optimise=False)
    ratio = min(sqnr_db(p, f) for p, f in zip(plain, fast, strict=True))
    if ratio < INT8_SQNR_DB:
        raise StageError(
            "export",
            f"ONNX Runtime's optimised outputs disagree with its unoptimised ones: {ratio:.1f} dB, "
            f"at least {INT8_SQNR_DB:g} are expected",
        )
    return ratio


def sqnr_db(signal: NDArray[Any], noisy: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio in dB; 200 for equal arrays."""
    signal = signal.astype(np.float64)
    noise = float(((signal - noisy.astype(np.float64)) ** 2).sum())
    power = float((signal**2).sum())
    if noise == 0:
        return 200.0
    return float(10 * np.log10(max(power, 1e-30) / noise)) if np.isfinite(noise) else -200.0


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]

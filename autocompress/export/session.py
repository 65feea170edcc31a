"""A graph in ONNX Runtime on the host, for what is looked at before a file goes to its device."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autocompress.core.errors import StageError
from autocompress.core.extras import require

Feeds = Mapping[str, NDArray[np.generic]]


class Session:
    """Runs a model file's bytes, on as many threads as torch has in this process.

    Threads that wait do not spin: beside a second worker of a search, calibrating a ResNet took twice the processor
    time with ONNX Runtime's defaults.
    """

    def __init__(self, model: bytes, stage: str, *, optimise: bool = True) -> None:
        """`stage` is what a failure is put down to.

        Raises:
            StageError: ONNX Runtime refuses the file.
        """
        self._stage = stage
        ort = require("onnxruntime", "onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises classes of its own for each status code
            raise self._failure(error) from error

    def run(self, feeds: Feeds) -> Sequence[NDArray[Any]]:
        """Outputs in order.

        Raises:
            StageError: ONNX Runtime fails on them.
        """
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:  # as above
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StageError:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        return StageError(self._stage, f"ONNX Runtime fails on the exported graph: {first}")

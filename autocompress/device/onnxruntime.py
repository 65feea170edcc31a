"""ONNX Runtime on the CPU."""

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import InputError, StageError, TargetError, unknown
from autocompress.core.extras import require
from autocompress.device.runtime import Array, Availability, Options, check_inputs

INSTALL = "pip install 'autocompress[onnxruntime]'"
_OPTIONS = ("threads", "optimization", "spinning")

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip

# Operators that compute with weights or contract tensors. Their precision is the type of their first input…
_COMPUTING = frozenset({
    "Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv", "ConvTranspose", "QLinearConvTranspose",
    "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "Einsum", "Gather", "Attention", "MultiHeadAttention", "QAttention", "LSTM", "GRU", "RNN",
})  # fmt: skip
# … except those that take floats and quantize them themselves.
_QUANTIZING = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_PRECISIONS = {
    "float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "int8": "int8", "uint8": "int8",
    "int16": "int16", "uint16": "int16",
}  # fmt: skip


class OnnxRuntime:
    """The CPU execution provider.

    Options: `threads` (1), `optimization` ("all" or "none"), `spinning` (idle threads wait busily; off with one
    thread, else on, which is the vendor's default).
    """

    def available(self) -> Availability:
        """Whether the package imports."""
        try:
            version = str(require("onnxruntime", "onnxruntime").__version__)
        except TargetError as error:
            return Availability(usable=False, version=None, reason=str(error), install=INSTALL)
        except ImportError as error:  # installed, but its native library does not load
            return Availability(usable=False, version=None, reason=f"onnxruntime fails: {error}", install=INSTALL)
        return Availability(usable=True, version=version, reason="", install=INSTALL)

    def load(self, path: Path, options: Options) -> "OnnxSession":
        """A session on an .onnx file."""
        return OnnxSession(path, options)


class OnnxSession:
    """One InferenceSession."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path, self._options = path, options
        self._session: Any = _session(path, _session_options(options))
        self._inputs = {i.name: (np.dtype(_dtype(i)), _shape(i.shape)) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._last: Mapping[str, Array] | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.bind(inputs)()

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], dict[str, Array]]:
        """A function that runs these inputs, without checking them again."""
        if self._session is None:
            raise InputError("the session is closed: load the file again")
        check_inputs(inputs, self._inputs)
        feeds, names, run, errors = dict(inputs), self._outputs, self._session.run, _errors()
        self._last = feeds

        def call() -> dict[str, Array]:
            try:  # no context manager here: entering one costs as much as a tenth of a small model
                return dict(zip(names, run(names, feeds), strict=True))
            except errors as error:
                raise _failure("measure", error) from error

        return call

    def executed_precision(self) -> dict[str, str]:
        """Precision by node name, from the profile of one run of a second session.

        The profile holds the graph after all fusions. A fused node keeps the name of its Conv, Gemm or MatMul with
        an addition ("fused x", "x/MatMulAddFusion", "x_token_3"), which is taken off again. Only the float
        blocked-layout pass renames nodes beyond recognition (after their output tensor), so that pass, which
        changes no precision, is off in the second session.
        """
        if self._last is None:
            raise InputError("what was executed is known only after a run")
        with tempfile.TemporaryDirectory() as folder, _stage("measure"):
            options = _session_options(self._options)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._path, options, disabled=["NchwcTransformer"])
            session.run(self._outputs, self._last)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _precisions(events)

    def close(self) -> None:
        """Release the session."""
        self._session = self._last = None


def _session_options(options: Options) -> Any:
    for name in options:
        if name not in _OPTIONS:
            raise InputError(unknown("option of onnxruntime", name, _OPTIONS))
    ort = require("onnxruntime", "onnxruntime")
    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    level, threads = str(options.get("optimization", "all")), int(options.get("threads", 1))
    if level not in levels:
        raise InputError(unknown("`optimization` of onnxruntime", level, levels))
    if threads < 1:
        raise InputError(f"`threads` must be at least 1, got {threads}")
    made = ort.SessionOptions()
    made.graph_optimization_level = levels[level]
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 3
    made.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.get("spinning", threads > 1))))
    return made


def _session(path: Path, options: Any, disabled: list[str] | None = None) -> Any:
    ort = require("onnxruntime", "onnxruntime")
    with _stage("load"):
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled or []
        )


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class, and what its binding makes of C++ ones."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnxruntime")
    own = [t for t in vars(state).values() if isinstance(t, type) and issubclass(t, Exception)]
    return (*own, RuntimeError)


@contextlib.contextmanager
def _stage(stage: str) -> Iterator[None]:
    """What ONNX Runtime raises inside, as StageError."""
    try:
        yield
    except StageError:
        raise
    except _errors() as error:
        raise _failure(stage, error) from error


def _failure(stage: str, error: Exception) -> StageError:
    return StageError(stage, f"onnxruntime: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def _dtype(argument: Any) -> str:
    if argument.type not in _DTYPES:
        raise StageError("load", f"model input {argument.name!r} is a {argument.type}, which cannot be fed")
    return _DTYPES[argument.type]


def _shape(shape: list[int | str | None]) -> tuple[int | None, ...]:
    return tuple(n if isinstance(n, int) else None for n in shape)


def _precisions(events: list[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operator, types = event["args"]["op_name"], event["args"].get("input_type_shape") or [{}]
        precision = "int8" if operator in _QUANTIZING else _PRECISIONS.get(next(iter(types[0]), ""))
        if precision is not None and operator in _COMPUTING | _QUANTIZING:
            found[_original(event["name"].removesuffix("_kernel_time"))] = precision
    return found


def _original(name: str) -> str:
    name = re.sub(r"_token_\d+$", "", name).removeprefix("fused ")
    return name.removesuffix("/MatMulAddFusion")

"""ONNX Runtime on the processor, and on an NVIDIA GPU through its CUDA and TensorRT execution providers.

No GPU of ours has run the latter two (docs/support.md).
"""

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
from autocompress.device import cuda
from autocompress.device.runtime import Array, Availability, Options, check_inputs

INSTALL = "pip install 'autocompress[onnxruntime]'"
_OPTIONS = ("threads", "optimization", "spinning", "provider", "cache_dir")
_CPU = "CPUExecutionProvider"
# `provider` → the execution providers in the order in which they are asked for each node.
_PROVIDERS = {
    "cpu": (_CPU,),
    "cuda": ("CUDAExecutionProvider", _CPU),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", _CPU),
}

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
    """One execution provider, with the processor for what it does not run.

    Options: `threads` (1), `optimization` ("all" or "none"), `spinning` (idle threads wait busily; off with one
    thread, else on, which is the vendor's default), `provider` ("cpu", "cuda", "tensorrt"; "cpu"), `cache_dir` (where
    the TensorRT provider keeps its engines). A run on a GPU holds the copies there and back.
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

    def facts(self, options: Options) -> dict[str, str]:
        """What of the GPU decides how files run, where it is one; of the processor the fingerprint tells.

        Raises:
            TargetError: this installation does not have the provider, or the GPU does not answer.
        """
        if _providers(options) == _PROVIDERS["cpu"]:
            return {}
        try:
            return {**cuda.facts(), "provider": _provider(options)}
        except StageError as error:
            raise TargetError(str(error)) from error

    def load(self, path: Path, options: Options) -> "OnnxSession":
        """A session on an .onnx file."""
        return OnnxSession(path, options)


class OnnxSession:
    """One InferenceSession."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path, self._options = path, options
        self._session: Any = _session(path, options, _session_options(options))
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

    def executed_precision(self) -> dict[str, str] | None:
        """Precision by node name, from the profile of one run of a second session.

        The profile holds the graph after all fusions. A fused node keeps the name of its Conv, Gemm or MatMul with
        an addition ("fused x", "x/MatMulAddFusion", "x_token_3"), which is taken off again. Only the float
        blocked-layout pass renames nodes beyond recognition (after their output tensor), so that pass, which
        changes no precision, is off in the second session. A node that ran on the processor though a GPU was asked
        says so. None with the TensorRT provider: its engines are single nodes here.
        """
        if self._last is None:
            raise InputError("what was executed is known only after a run")
        if _provider(self._options) == "tensorrt":
            return None
        with tempfile.TemporaryDirectory() as folder, _stage("measure"):
            options = _session_options(self._options)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._path, self._options, options, disabled=["NchwcTransformer"])
            session.run(self._outputs, self._last)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _precisions(events, _PROVIDERS[_provider(self._options)][0])

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


def _session(path: Path, options: Options, made: Any, disabled: list[str] | None = None) -> Any:
    ort = require("onnxruntime", "onnxruntime")
    wanted = _providers(options)
    settings: list[dict[str, str]] = [{} for _ in wanted]
    if _provider(options) == "tensorrt" and "cache_dir" in options:
        folder = str(Path(str(options["cache_dir"])).expanduser())
        settings[0] = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1", "trt_engine_cache_path": folder}
    with _stage("load"):
        session = ort.InferenceSession(
            str(path), made, providers=list(wanted), provider_options=settings, disabled_optimizers=disabled or []
        )
    if session.get_providers()[0] != wanted[0]:  # it warns, and takes the next one
        raise StageError("load", f"onnxruntime: {wanted[0]} does not start, see its message on standard error")
    return session


def _provider(options: Options) -> str:
    name = str(options.get("provider", "cpu"))
    if name not in _PROVIDERS:
        raise InputError(unknown("`provider` of onnxruntime", name, _PROVIDERS))
    return name


def _providers(options: Options) -> tuple[str, ...]:
    wanted = _PROVIDERS[_provider(options)]
    has = require("onnxruntime", "onnxruntime").get_available_providers()
    if wanted[0] not in has:
        raise TargetError(
            f"this onnxruntime has no {wanted[0]}: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    return wanted


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


def _precisions(events: list[dict[str, Any]], provider: str = _CPU) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operator, types = event["args"]["op_name"], event["args"].get("input_type_shape") or [{}]
        precision = "int8" if operator in _QUANTIZING else _PRECISIONS.get(next(iter(types[0]), ""))
        if precision is not None and operator in _COMPUTING | _QUANTIZING:
            ran = event["args"].get("provider", provider)
            where = "" if ran == provider else f" on {ran}"
            found[_original(event["name"].removesuffix("_kernel_time"))] = precision + where
    return found


def _original(name: str) -> str:
    name = re.sub(r"_token_\d+$", "", name).removeprefix("fused ")
    return name.removesuffix("/MatMulAddFusion")

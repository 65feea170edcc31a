"""TensorRT 10 and 11 on an NVIDIA GPU.

Written to the documented interface; no GPU of ours has run it (docs/support.md).
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.core.extras import require
from autocompress.device import cuda, nvml
from autocompress.device.runtime import Array, Availability, Options, check_inputs
from autocompress.device.tensorrt_engine import Engine, Settings, engine_of, failure, logger, onnx_names

INSTALL = "pip install 'autocompress[tensorrt]'"
_OLDEST = 10

# The words by which an engine's description names a type ("Half", "Row major linear FP16 format", …).
_PRECISIONS = {
    "int8": "int8", "int4": "int4", "fp8": "fp8", "fp4": "fp4", "half": "fp16", "fp16": "fp16", "bf16": "bf16",
    "bfloat16": "bf16", "float": "fp32", "fp32": "fp32",
}  # fmt: skip
_MOVING = ("reformat", "noop", "constant")


class TensorRt:
    """The first visible CUDA device.

    An .onnx file becomes an engine inside `load`, or is found among those built before. What `run` takes holds the
    copies to the GPU and back, as for a program whose data is in the host's memory.

    Options: `threads` (taken and of no effect), and those of `Settings`.
    """

    def available(self) -> Availability:
        """Whether TensorRT and cuda-bindings import, the version is one that is known, and a GPU is there."""
        version, reason = None, ""
        try:
            version = str(require("tensorrt", "tensorrt").__version__)
        except TargetError as error:
            reason = str(error)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # installed, without its libraries
            reason = f"tensorrt fails: {error}"
        if version is not None and int(version.partition(".")[0]) < _OLDEST:
            reason = f"tensorrt {version} is too old: version {_OLDEST} or newer is needed"
        reason = reason or cuda.unusable() or ""
        return Availability(usable=not reason, version=version, reason=reason, install=INSTALL)

    def facts(self, options: Options) -> dict[str, str]:  # noqa: ARG002 - there is one device whatever the options
        """What of the GPU decides how files run, and what it computes in.

        Raises:
            TargetError: it does not answer.
        """
        try:
            return {**device_facts(), **nvml.facts(cuda.bus_id())}
        except StageError as error:
            raise TargetError(str(error)) from error

    def load(self, path: Path, options: Options) -> "TensorRtSession":
        """A session on an .onnx file."""
        settings, device = Settings.of(options), device_facts()
        engine = engine_of(path, settings, device)
        try:
            return TensorRtSession(engine)
        except _Unreadable:  # what is kept may be damaged, or of a driver that says less of itself than it should
            return TensorRtSession(engine_of(path, settings, device, fresh=True))


def device_facts() -> dict[str, str]:
    """The GPU, its software, and its arithmetic by NVIDIA's support matrix: bfloat16 from 8.0, eight-bit floats 8.9."""
    found = cuda.facts()
    capability = tuple(int(n) for n in found["compute_capability"].split("."))
    return {
        **found,
        "tensorrt": str(require("tensorrt", "tensorrt").__version__),
        "float_precisions": "fp32 fp16 bf16" if capability >= (8, 0) else "fp32 fp16",
        "quantized": "int8 fp8" if capability >= (8, 9) else "int8",
    }


class _Unreadable(StageError):
    """An engine that this TensorRT does not take."""


class TensorRtSession:
    """One engine with an execution context and a stream of its own."""

    def __init__(self, engine: Engine) -> None:
        trt: Any = require("tensorrt", "tensorrt")
        self._log = logger()
        self._runtime: Any = trt.Runtime(self._log)  # an engine needs it for as long as it lives
        self._engine: Any = self._runtime.deserialize_cuda_engine(engine.data)
        if self._engine is None:
            raise _Unreadable("load", str(failure("load", "the engine cannot be read", self._log)))
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise failure("load", "the engine cannot be run", self._log)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        fed = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._inputs = {name: (_dtype(trt, self._engine, name), self._shape(name)) for name in fed}
        self._outputs = {name: _dtype(trt, self._engine, name) for name in names if name not in fed}
        self._computing = engine.computing
        self._stream = cuda.Stream()
        self._bound: object = None
        self._ran = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.bind(inputs)()

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], dict[str, Array]]:
        """A function that copies these inputs to the GPU, runs, copies the outputs back and waits for them."""
        if self._context is None:
            raise InputError("the session is closed: load the file again")
        check_inputs(inputs, self._inputs)
        self._check_batch(inputs)
        feeds = {name: np.require(inputs[name], requirements=["C"]) for name in self._inputs}
        shapes: dict[str, tuple[int, ...]] = {}

        def call() -> dict[str, Array]:
            if self._bound is not call:  # another call was bound since: its shapes and places are not these
                shapes.update(self._place(feeds))
                self._bound = call
            for name, array in feeds.items():
                self._stream.upload(name, array)
            if not self._context.execute_async_v3(self._stream.handle):
                raise failure("measure", "the engine fails", self._log)
            outputs = {name: np.empty(shapes[name], dtype) for name, dtype in self._outputs.items()}
            for name, array in outputs.items():
                self._stream.download(name, array)
            self._stream.wait()
            self._ran = True
            return outputs

        return call

    def executed_precision(self) -> dict[str, str] | None:
        """Precision by node name, from the engine's description; None where it describes no node of the file."""
        if not self._ran:
            raise InputError("what was executed is known only after a run")
        trt: Any = require("tensorrt", "tensorrt")
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return precisions(json.loads(text), self._computing)

    def close(self) -> None:
        """Release the engine and its memory on the GPU."""
        if self._context is not None:
            self._stream.close()
        self._context = self._engine = self._runtime = self._bound = None

    def _shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(None if n < 0 else int(n) for n in self._engine.get_tensor_shape(name))

    def _check_batch(self, inputs: Mapping[str, Array]) -> None:
        for name, (_, shape) in self._inputs.items():
            if None in shape:
                _, _, largest = self._engine.get_tensor_profile_shape(name, 0)
                most = int(largest[0])
                if not 1 <= len(inputs[name]) <= most:
                    raise InputError(
                        f"model input {name!r} has {len(inputs[name])} items, the engine takes 1 to {most}: "
                        "see the option `max_batch`"
                    )

    def _place(self, feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        """Tell the engine the shapes and where its tensors lie; the outputs' shapes."""
        for name, array in feeds.items():
            if not self._context.set_input_shape(name, array.shape):
                raise failure("measure", f"the engine does not take {name!r} of shape {array.shape}", self._log)
            self._context.set_tensor_address(name, self._stream.buffer(name, array.nbytes))
        shapes = {name: tuple(int(n) for n in self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in shapes.items():
            if any(n < 0 for n in shape):
                raise StageError("measure", f"tensorrt: the size of output {name!r} depends on the data: {shape}")
            size = int(np.prod(shape, dtype=np.int64)) * self._outputs[name].itemsize
            self._context.set_tensor_address(name, self._stream.buffer(name, size))
        return shapes


def precisions(description: Mapping[str, Any], computing: frozenset[str]) -> dict[str, str] | None:
    """Precision by node name, given an engine's description as JSON and the names of the nodes that compute.

    A layer of the engine lists the nodes it was made of and the type of what it reads first, which is what it computes
    in. A table is looked up: what comes out says more.
    """
    found: dict[str, str] = {}
    for layer in description.get("Layers", []):
        if not isinstance(layer, Mapping) or str(layer.get("LayerType", "")).lower() in _MOVING:
            continue
        lookup = "gather" in str(layer.get("LayerType", "")).lower()
        tensors = layer.get("Outputs" if lookup else "Inputs") or []
        types = [_precision(str(t.get("Format/Datatype", t.get("Datatype", "")))) for t in tensors]
        precision = next((t for t in types if t is not None), None)
        for name in onnx_names(str(layer.get("Metadata", ""))):
            if name in computing and precision is not None:
                found.setdefault(name, precision)
    return found or None


def _precision(words: str) -> str | None:
    return next((_PRECISIONS[w] for w in re.findall(r"[a-z]+[0-9]*", words.lower()) if w in _PRECISIONS), None)


def _dtype(trt: Any, engine: Any, name: str) -> np.dtype[Any]:
    kind = engine.get_tensor_dtype(name)
    try:
        found: np.dtype[Any] = np.dtype(trt.nptype(kind))
        return found
    except TypeError as error:  # what numpy has no type for, bfloat16 say
        raise StageError("load", f"model tensor {name!r} is a {kind}, which cannot be fed") from error

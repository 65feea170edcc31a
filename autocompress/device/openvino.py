"""OpenVINO on an Intel or AMD processor, an Intel GPU or an Intel NPU."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import InputError, StageError, TargetError, unknown
from autocompress.core.extras import require
from autocompress.device.runtime import Array, Availability, Options, check_inputs

INSTALL = "pip install 'autocompress[openvino]'"
_OPTIONS = ("threads", "device", "inference_precision", "cache_dir")
_DEVICES = ("CPU", "GPU", "NPU")

# `inference_precision` → (what candidates call it, the capability a device lists where it computes in it).
_FLOATS = {"f32": ("fp32", "FP32"), "bf16": ("bf16", "BF16"), "f16": ("fp16", "FP16")}
_DTYPES = {
    "f32": "float32", "f16": "float16", "f64": "float64", "boolean": "bool", "i8": "int8", "i16": "int16",
    "i32": "int32", "i64": "int64", "u8": "uint8", "u16": "uint16", "u32": "uint32", "u64": "uint64",
}  # fmt: skip
_PRECISIONS = {
    "f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4",
}  # fmt: skip

# Operators that compute with weights or contract tensors …
_COMPUTING = frozenset({
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul", "Einsum",
    "Gather", "LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell",
    "ScaledDotProductAttention",
})  # fmt: skip
# … and those whose name the kernel may bear instead, when it has swallowed them: a bias, and what rounds.
_SWALLOWED = frozenset({"Add", "Subtract", "Multiply", "FakeQuantize", "Convert"})


class OpenVino:
    """One device of OpenVINO's.

    Options: `threads` (1; processors only), `device` ("CPU", "GPU", "GPU.1", "NPU"; "CPU"), `inference_precision`
    ("f32", "bf16", "f16": arithmetic of what is not integer; "f32", never the device's own choice), `cache_dir` (where
    compiled models are kept; nowhere by default).
    """

    def available(self) -> Availability:
        """Whether the package imports."""
        try:
            version = str(require("openvino", "openvino").__version__).partition("-")[0]
        except TargetError as error:
            return Availability(usable=False, version=None, reason=str(error), install=INSTALL)
        except ImportError as error:  # installed, but its native library does not load
            return Availability(usable=False, version=None, reason=f"openvino fails: {error}", install=INSTALL)
        return Availability(usable=True, version=version, reason="", install=INSTALL)

    def facts(self, options: Options) -> dict[str, str]:
        """What of the device decides how files run: its name and the arithmetic it has.

        Raises:
            TargetError: OpenVINO does not see it.
        """
        device = _device(options)
        return {
            "device": str(_core().get_property(device, "FULL_DEVICE_NAME")),
            "float_precisions": " ".join(float_precisions(device)),
        }

    def load(self, path: Path, options: Options) -> "OpenVinoSession":
        """A session on an .onnx file, or on the .xml of an IR whose .bin lies beside it."""
        return OpenVinoSession(path, options)


def float_precisions(device: str = "CPU") -> tuple[str, ...]:
    """What the device computes in where nothing is integer, of fp32, bf16 and fp16; asking for another is no error
    in OpenVINO, and runs in fp32.

    Raises:
        TargetError: OpenVINO does not see the device.
    """
    listed = _core().get_property(_device({"device": device}), "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name, capability in _FLOATS.values() if capability in listed)


class OpenVinoSession:
    """One model, compiled for each shape of inputs that comes.

    A model compiled for any batch size takes a tenth to a third longer on small networks (0.070 against 0.056 ms,
    0.093 against 0.068 ms), and an NPU does not run it: who deploys for one size fixes it, and so does this.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._device, self._properties = _device(options), _properties(options)
        with _stage("load"):
            self._model: Any = _core().read_model(_existing(path))
        self._inputs = {i.get_node().get_friendly_name(): _expected(i) for i in self._model.inputs}
        self._outputs = [_output_name(result) for result in self._model.get_results()]
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._last: Any = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.bind(inputs)()

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], dict[str, Array]]:
        """A function that runs these inputs, without checking them again.

        Raises:
            StageError: the model cannot be compiled for this shape; stage "load".
        """
        if self._model is None:
            raise InputError("the session is closed: load the file again")
        check_inputs(inputs, self._inputs)
        arrays = [np.require(inputs[name], requirements=["C", "W"]) for name in self._inputs]
        compiled = self._compile(tuple(array.shape for array in arrays))
        tensor = require("openvino", "openvino").Tensor
        with _stage("measure"):
            request = compiled.create_infer_request()
            for i, array in enumerate(arrays):
                request.set_input_tensor(i, tensor(array, shared_memory=True))
        names, infer = self._outputs, request.infer
        self._last = compiled

        def call() -> dict[str, Array]:
            try:
                return dict(zip(names, infer().values(), strict=True))
            except RuntimeError as error:
                raise _failure("measure", error) from error

        return call

    def executed_precision(self) -> dict[str, str] | None:
        """Precision by node name, from the compiled model; None where the device's plugin does not describe it."""
        if self._last is None:
            raise InputError("what was executed is known only after a run")
        try:
            executed = self._last.get_runtime_model().get_ordered_ops()
        except RuntimeError:
            return None
        return _precisions(self._model.get_ordered_ops(), executed, set(self._inputs))

    def close(self) -> None:
        """Release the model and all that was compiled of it."""
        self._model = self._last = None
        self._compiled.clear()

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        if shapes not in self._compiled:
            with _stage("load"):
                model = self._model.clone()
                model.reshape(dict(enumerate(shapes)))
                self._compiled[shapes] = _core().compile_model(model, self._device, self._properties)
        return self._compiled[shapes]


def _core() -> Any:
    return _core_of(require("openvino", "openvino"))


@functools.cache
def _core_of(openvino: Any) -> Any:
    """One for the process, never let go of.

    The processor's plugin (2026.4) sets a stack for signals, and frees it with its last core while it is still set: the
    next signal that Python handles would end the process.
    """
    return openvino.Core()


def _device(options: Options) -> str:
    name = str(options.get("device", "CPU"))
    kind, _, number = name.partition(".")
    if kind not in _DEVICES or not (number.isdecimal() or name == kind):
        raise InputError(unknown("`device` of openvino", name, _DEVICES))
    seen = _core().available_devices
    if not any(name in (d, d.partition(".")[0]) for d in seen):
        raise TargetError(
            f"OpenVINO sees no {name} here, only {', '.join(seen) or 'nothing'}: is its driver installed?"
        )
    return name


def _properties(options: Options) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise InputError(unknown("option of openvino", name, _OPTIONS))
    threads, precision = int(options.get("threads", 1)), str(options.get("inference_precision", "f32"))
    if threads < 1:
        raise InputError(f"`threads` must be at least 1, got {threads}")
    if precision not in _FLOATS:
        raise InputError(unknown("`inference_precision` of openvino", precision, _FLOATS))
    device = _device(options)
    wanted: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # sessions side by side would be pinned to the same core
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations of layers with small weights turn integer unasked
    }
    if _FLOATS[precision][0] in (has := float_precisions(device)):
        wanted["INFERENCE_PRECISION_HINT"] = precision
    elif precision != "f32":  # OpenVINO would run it in f32 without a word
        raise InputError(f"`inference_precision` {precision} is nothing that {device} here has: {', '.join(has)}")
    if "cache_dir" in options:
        wanted["CACHE_DIR"] = str(Path(str(options["cache_dir"])).expanduser())
    supported = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {k: v for k, v in wanted.items() if k == "CACHE_DIR" or supported.get(k) == "RW"}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise StageError("load", f"openvino: there is no file {path}")
    return path


def _expected(port: Any) -> tuple[np.dtype[Any], tuple[int | None, ...]]:
    name, kind = port.get_node().get_friendly_name(), port.get_element_type().get_type_name()
    shape = port.get_partial_shape()
    if kind not in _DTYPES:
        raise StageError("load", f"model input {name!r} is a {kind}, which cannot be fed")
    if shape.rank.is_dynamic:
        raise StageError("load", f"model input {name!r} does not say how many dimensions it has")
    return np.dtype(_DTYPES[kind]), tuple(None if n.is_dynamic else n.get_length() for n in shape)


def _output_name(result: Any) -> str:
    """The name in the file, which OpenVINO keeps in that of the Result node: "logits/sink_port_0"."""
    name = str(result.get_friendly_name()).partition("/sink_port_")[0]
    names = result.output(0).get_names()
    return name if name in names or not names else min(names)


@contextlib.contextmanager
def _stage(stage: str) -> Iterator[None]:
    """What OpenVINO raises inside, which is RuntimeError alone, as StageError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, StageError):
            raise
        raise _failure(stage, error) from error


def _failure(stage: str, error: Exception) -> StageError:
    lines = (line.strip() for line in str(error).splitlines())
    said = [line for line in lines if line and not re.match(r"Exception from |Check '|FrontEnd API failed", line)]
    return StageError(stage, f"openvino: {' '.join(said[:2]) or type(error).__name__}")


def _precisions(file: Iterable[Any], executed: Iterable[Any], inputs: set[str]) -> dict[str, str] | None:
    """Precision by the name of the file's nodes.

    A kernel bears the names of all that it was made of, except where a MatMul has become a fully connected layer: then
    that of its bias alone. So those that bear a layer's own name come first.
    """
    own, after = _names(file, inputs)
    kernels = [kernel for op in executed if (kernel := _kernel(op)) is not None]
    if not kernels:
        return None
    found: dict[str, str] = {}
    for layers in (own, after):
        for names, precision in kernels:
            for name in names:
                if precision is not None and name in layers:
                    found.setdefault(layers[name], precision)
    return found


def _names(file: Iterable[Any], inputs: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file by those in OpenVINO: of the nodes that compute, and of what may be swallowed behind them."""
    own: dict[str, str] = {}
    after: dict[str, str] = {}
    constant: set[str] = set()
    for op in file:
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = [v.get_source_output().get_node().get_friendly_name() for v in op.inputs()]
        computed = [source for source in sources if source not in constant]
        if not computed and kind != "Parameter":
            constant.add(name)
        elif kind in _COMPUTING:
            own[name] = _in_file(name, inputs)
        elif kind in _SWALLOWED and len(computed) == 1 and (layer := own.get(computed[0], after.get(computed[0]))):
            after[name] = layer
    return own, after


def _in_file(name: str, inputs: set[str]) -> str:
    """The ONNX reader splits a bias off ("fc/WithoutBiases") and numbers a node that is called like an input."""
    name = name.removesuffix("/WithoutBiases")
    unnumbered = re.sub(r"_\d+$", "", name)
    return unnumbered if unnumbered in inputs else name


def _kernel(op: Any) -> tuple[list[str], str | None] | None:
    """What a node of a compiled model was made of, and its precision; None for one that says neither."""
    info = op.get_rt_info()
    if "originalLayersNames" not in info:
        return None
    # A table is looked up, whatever it is stored in: what comes out is what others compute with.
    lookup = str(info["layerType"].value).lower() == "gather"
    ports = op.outputs() if lookup else op.inputs()
    kind = ports[0].get_element_type().get_type_name() if ports else ""
    # The list of what was fused is sometimes that of another kernel (after a layer norm); the own name is not.
    names = [op.get_friendly_name(), *str(info["originalLayersNames"].value).split(",")]
    return [name.partition("/Dequantization")[0] for name in names], _PRECISIONS.get(kind)

"""LiteRT (TensorFlow Lite) on the CPU, with XNNPACK."""

import contextlib
import functools
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import InputError, StageError, TargetError, unknown
from autocompress.core.extras import require
from autocompress.device.runtime import Array, Availability, Options, check_inputs

INSTALL = "pip install 'autocompress[tflite]'"
_OPTIONS = ("threads", "xnnpack")

# Google's package of today, and the last one of its old name, which is built for numpy 1: with numpy 2 it imports,
# and fails when an interpreter is made.
_PACKAGES: Mapping[str, Callable[[], Any]] = {
    "ai-edge-litert": lambda: require("ai_edge_litert.interpreter", "tflite"),
    "tflite-runtime": lambda: require("tflite_runtime.interpreter", "tflite"),
}
# A model of one ABS on one float: what an interpreter is tried with.
_TRIAL = b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAcAAAAtAAAAAMAAAABAAAACAAAAAQABAAEAAAAAQAAABAAAAAMABQAEAAMAAgABAAMAAAA"
    "EAAAADwAAABAAAAARAAAAAEAAAAQAAAAAAAKAAwAAAAIAAQACgAAAAgAAAAMAAAAAQAAAAEAAAABAAAAAAAAAAEAAAABAAAAAQAAAAAAAAACAAAA"
    "IAAAAAQAAADu////BAAAAAEAAAABAAAAAAAGAAgABAAGAAAABAAAAAEAAAABAAAAAQAAABAAAAAMAAwACwAAAAAABAAMAAAAZQAAAAAAAGU="
)

# Operators that compute with weights or contract tensors, and the place of the activations among their inputs.
_COMPUTING: Mapping[str, int] = {
    "CONV_2D": 0, "DEPTHWISE_CONV_2D": 0, "CONV_3D": 0, "TRANSPOSE_CONV": 2, "CONV_3D_TRANSPOSE": 2,
    "FULLY_CONNECTED": 0, "BATCH_MATMUL": 0, "SVDF": 0, "RNN": 0, "UNIDIRECTIONAL_SEQUENCE_RNN": 0, "LSTM": 0,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": 0, "BIDIRECTIONAL_SEQUENCE_LSTM": 0,
}  # fmt: skip
_LOOKUPS = frozenset({"EMBEDDING_LOOKUP", "GATHER"})
_PRECISIONS = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8", "int16": "int16",
}  # fmt: skip
_INTEGER_WEIGHTS = frozenset({"int8", "uint8", "int4", "uint4", "int2"})
_DELEGATE = "DELEGATE"

# All that the interpreter raises: ValueError for a file or a tensor, RuntimeError for what fails in the native code.
_ERRORS = (ValueError, RuntimeError)


class LiteRt:
    """The interpreter of `ai-edge-litert`, or of `tflite-runtime` where that alone works.

    Options: `threads` (1), `xnnpack` (whether XNNPACK's kernels run what they can; true, the vendor's default).
    """

    def available(self) -> Availability:
        """Whether an interpreter can be made."""
        try:
            name, module = _package()
        except TargetError as error:
            return Availability(usable=False, version=None, reason=str(error), install=INSTALL)
        version = str(sys.modules[module.__name__.partition(".")[0]].__version__)
        version += "" if name == "ai-edge-litert" else f" ({name})"
        return Availability(usable=True, version=version, reason="", install=INSTALL)

    def facts(self, options: Options) -> dict[str, str]:
        """Whether XNNPACK is in this build and on: without it, other kernels run the same file."""
        interpreter = _interpreter({"model_content": _TRIAL}, options)
        return {"delegate": "XNNPACK" if _count_delegates(interpreter) else "none"}

    def load(self, path: Path, options: Options) -> "LiteRtSession":
        """A session on a .tflite file with at most one signature."""
        return LiteRtSession(path, options)


class LiteRtSession:
    """One interpreter."""

    def __init__(self, path: Path, options: Options) -> None:
        if not path.is_file():
            raise StageError("load", f"litert: there is no file {path}")
        self._interpreter: Any = _interpreter({"model_path": str(path)}, options)
        given, made = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        inputs, outputs = _signature(self._interpreter)
        self._indices = _names(given, inputs)
        self._outputs = _names(made, outputs)
        details = {d["index"]: d for d in given}
        self._inputs = {name: (np.dtype(details[i]["dtype"]), _shape(details[i])) for name, i in self._indices.items()}
        self._shapes = {i: tuple(int(n) for n in d["shape"]) for i, d in details.items()}
        self._ran = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self.bind(inputs)()

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], dict[str, Array]]:
        """A function that runs these inputs, without checking them again.

        It copies them in and the outputs out, as every program with this runtime does.

        Raises:
            StageError: the model does not take this batch size; stage "load".
        """
        if self._interpreter is None:
            raise InputError("the session is closed: load the file again")
        check_inputs(inputs, self._inputs)
        feeds = [(index, np.ascontiguousarray(inputs[name])) for name, index in self._indices.items()]
        shapes = {index: array.shape for index, array in feeds}
        self._resize(shapes)
        self._ran = True
        interpreter, outputs = self._interpreter, self._outputs
        feed, invoke, fetch = interpreter.set_tensor, interpreter.invoke, interpreter.get_tensor

        def call() -> dict[str, Array]:
            if self._shapes != shapes:  # another size came in between
                self._resize(shapes)
            try:
                for index, array in feeds:
                    feed(index, array)
                invoke()
                return {name: fetch(index) for name, index in outputs.items()}
            except _ERRORS as error:
                raise _failure("measure", error) from error

        return call

    def executed_precision(self) -> dict[str, str]:
        """Precision by the name of the operator's output tensor, from the types the interpreter's plan has."""
        if not self._ran:
            raise InputError("what was executed is known only after a run")
        tensors = self._interpreter.get_tensor_details()
        return _precisions(self._interpreter._get_ops_details(), {t["index"]: t for t in tensors})

    def diagnosis(self) -> dict[str, str]:
        """Into how many pieces the graph is cut: 1 where XNNPACK runs it as a whole, 0 where it runs nothing."""
        return {"delegates": str(delegates(self))}

    def close(self) -> None:
        """Release the interpreter."""
        self._interpreter = None

    def _resize(self, shapes: Mapping[int, tuple[int, ...]]) -> None:
        if self._shapes == shapes:
            return
        self._shapes = {}  # of nobody, until all went well
        with _stage("load"):
            for index, shape in shapes.items():
                self._interpreter.resize_tensor_input(index, shape)
            self._interpreter.allocate_tensors()
        self._shapes = dict(shapes)


def delegates(session: LiteRtSession) -> int:
    """Pieces of the graph that XNNPACK runs.

    Each further piece is a copy forth and back, and what lies between runs on slower kernels.
    """
    return _count_delegates(session._interpreter)


def _count_delegates(interpreter: Any) -> int:
    return sum(op["op_name"] == _DELEGATE for op in interpreter._get_ops_details())


@functools.cache
def _package() -> tuple[str, Any]:
    """The first package that can make an interpreter, and its module."""
    reasons: list[str] = []
    for name, load in _PACKAGES.items():
        try:
            module = load()
            module.Interpreter(model_content=_TRIAL, num_threads=1).allocate_tensors()
        except TargetError as error:
            reasons += [str(error)] if not reasons else []
        except (ImportError, SystemError, *_ERRORS) as error:  # built for another numpy, or another C library
            reasons.append(f"{name} fails: {error.__cause__ or error}")
        else:
            return name, module
    raise TargetError("; ".join(reasons))


def _interpreter(model: Mapping[str, Any], options: Options) -> Any:
    for name in options:
        if name not in _OPTIONS:
            raise InputError(unknown("option of litert", name, _OPTIONS))
    threads = int(options.get("threads", 1))
    if threads < 1:
        raise InputError(f"`threads` must be at least 1, got {threads}")
    _, module = _package()
    kinds = module.OpResolverType
    kind = kinds.AUTO if options.get("xnnpack", True) else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with _stage("load"):
        made = module.Interpreter(**model, num_threads=threads, experimental_op_resolver_type=kind)
        made.allocate_tensors()
    return made


def _signature(interpreter: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Tensors of the inputs and of the outputs by the names of the file's signature; empty where it has none."""
    signatures = list(interpreter.get_signature_list())
    if not signatures:
        return {}, {}
    if len(signatures) > 1:
        raise StageError("load", f"litert: the file has the signatures {', '.join(signatures)}, and one is expected")
    runner = interpreter.get_signature_runner(signatures[0])
    details = (runner.get_input_details(), runner.get_output_details())
    inputs, outputs = ({name: int(d["index"]) for name, d in found.items()} for found in details)
    return inputs, outputs


def _names(tensors: Iterable[Mapping[str, Any]], signature: Mapping[str, int]) -> dict[str, int]:
    """Tensors in the model's order, which a signature does not keep, by their names in it, else by their own."""
    return {
        name: int(tensor["index"])
        for tensor in tensors
        for name in ([n for n, i in signature.items() if i == tensor["index"]] or [str(tensor["name"])])
    }


def _shape(details: Mapping[str, Any]) -> tuple[int | None, ...]:
    return tuple(None if n < 0 else int(n) for n in details["shape_signature"])


def _precisions(operators: Iterable[Mapping[str, Any]], tensors: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for op in operators:
        kind, output = op["op_name"], int(op["outputs"][0]) if len(op["outputs"]) else -1
        inputs = [np.dtype(tensors[i]["dtype"]).name for i in op["inputs"] if i in tensors]
        if kind in _LOOKUPS:  # whatever the table is stored in: what comes out is what others compute with
            precision = _PRECISIONS.get(np.dtype(tensors[output]["dtype"]).name)
        elif kind in _COMPUTING:
            # Float activations on integer weights: the kernel makes them integer itself, at every run anew.
            dynamic = inputs[_COMPUTING[kind]] == "float32" and not _INTEGER_WEIGHTS.isdisjoint(inputs)
            precision = "int8" if dynamic else _PRECISIONS.get(inputs[_COMPUTING[kind]])
        else:
            precision = None
        if precision is not None:
            found[str(tensors[output]["name"])] = precision
    return found


@contextlib.contextmanager
def _stage(stage: str) -> Iterator[None]:
    """What the interpreter raises inside, as StageError."""
    try:
        yield
    except _ERRORS as error:
        raise _failure(stage, error) from error


def _failure(stage: str, error: Exception) -> StageError:
    return StageError(stage, f"litert: {str(error).splitlines()[0] if str(error) else type(error).__name__}")

"""TensorRT engines: built of an ONNX file on the device that runs them, once, and kept.

An engine is good for one kind of GPU, one driver and one TensorRT. Building it times kernels, takes minutes, and gives
another engine each time (TensorRT#4730); the timing cache holds what was timed, so that a file built again has the same
kernels, and files that share layers have the same ones for them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.core.artifact import sha256_of
from autocompress.core.errors import InputError, StageError, unknown
from autocompress.core.extras import require
from autocompress.device.runtime import Options

_COMPUTING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "GATHER", "ATTENTION", "ATTENTION_INPUT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of the runtime.

    Attributes:
        sparse_weights: look for kernels that skip the zeros of the pattern 2:4.
        tf32: let float32 products be rounded to 10 bits, which is TensorRT's own default.
        max_batch: the largest batch that is run, where the file leaves it free; kernels are chosen for a batch of one.
        build_timeout_s: after so long a build is given up.
        cache_dir: where engines are kept.
    """

    sparse_weights: bool = False
    tf32: bool = False
    max_batch: int = 16
    build_timeout_s: float = 900.0
    cache_dir: Path = Path("~/.cache/autocompress/tensorrt")

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InputError(f"`max_batch` must be at least 1, got {self.max_batch}")
        if not self.build_timeout_s > 0:
            raise InputError(f"`build_timeout_s` must be positive, got {self.build_timeout_s:g}")

    @classmethod
    def of(cls, options: Options) -> "Settings":
        """The settings that these options are.

        Raises:
            InputError: an option that TensorRT does not know, or a value it does not take.
        """
        known = ("threads", *_TYPES)
        for name in options:
            if name not in known:
                raise InputError(unknown("option of tensorrt", name, known))
        if (threads := int(options.get("threads", 1))) < 1:
            raise InputError(f"`threads` must be at least 1, got {threads}")
        return cls(**{name: read(options[name]) for name, read in _TYPES.items() if name in options})


_TYPES: Mapping[str, Callable[[Any], Any]] = {
    "sparse_weights": bool,
    "tf32": bool,
    "max_batch": int,
    "build_timeout_s": float,
    "cache_dir": Path,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serialized engine, and the names of the file's nodes that compute with weights or contract tensors."""

    data: bytes
    computing: frozenset[str]


def engine_of(path: Path, settings: Settings, device: Mapping[str, str], *, fresh: bool = False) -> Engine:
    """The engine of an ONNX file: the one that is kept for this file, device and settings, else a new one.

    Args:
        device: facts of the GPU and its software; an engine of other facts is another engine.
        fresh: build it even if one is kept.

    Raises:
        StageError: TensorRT cannot build it, or not in time; stage "load".
    """
    folder = settings.cache_dir.expanduser()
    stored = folder / f"{engine_key(path, settings, device)}.engine"
    if not fresh and stored.is_file():
        return _unpack(stored.read_bytes())
    with _alone(folder):  # a build beside another would time its kernels on a busy device
        if fresh or not stored.is_file():
            _write(stored, _pack(_build(path, settings, folder / f"timing-{_digest(dict(device))}.cache")))
        return _unpack(stored.read_bytes())


def engine_key(path: Path, settings: Settings, device: Mapping[str, str]) -> str:
    """Names the engine of a file: all that decides what is built."""
    if not path.is_file():
        raise StageError("load", f"tensorrt: there is no file {path}")
    build = [settings.sparse_weights, settings.tf32, settings.max_batch]
    return _digest([sha256_of(path), build, dict(device)])


def logger() -> Any:
    """A TensorRT logger that keeps what went wrong, in its `errors`."""
    trt: Any = require("tensorrt", "tensorrt")

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Log()


def failure(stage: str, what: str, log: Any) -> StageError:
    """What TensorRT could not do, with the first of its own words on it."""
    said = next((re.sub(r"\s+", " ", text).strip() for text in log.errors), "")
    return StageError(stage, f"tensorrt: {what}" + (f": {said[:300]}" if said else ""))


def _build(path: Path, settings: Settings, timing: Path) -> Engine:
    trt: Any = require("tensorrt", "tensorrt")
    log = logger()
    builder = trt.Builder(log)
    # The one kind of network there is from version 11 on; 10 has to be told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise StageError("load", f"tensorrt: its importer refuses the file: {said[0][:300] if said else 'no reason'}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else an engine does not tell what it runs
    if settings.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    _allow_batches(builder, network, config, settings.max_batch)
    config.set_timing_cache(config.create_timing_cache(timing.read_bytes() if timing.is_file() else b""), False)
    monitor = _deadline(settings.build_timeout_s)
    config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    if monitor.passed:
        raise StageError(
            "load",
            f"tensorrt: the engine was not built in {settings.build_timeout_s:g} s: raise `build_timeout_s`",
        )
    if data is None:
        raise failure("load", "it cannot build an engine of the file", log)
    _write(timing, bytes(config.get_timing_cache().serialize()))
    return Engine(data=bytes(data), computing=_computing(trt, network))


def _allow_batches(builder: Any, network: Any, config: Any, max_batch: int) -> None:
    """Any batch up to the largest, with kernels chosen for one item; no other size may be free."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if all(-1 not in tuple(value.shape) for value in inputs):
        return
    profile = builder.create_optimization_profile()
    for value in inputs:
        shape = tuple(value.shape)
        if -1 in shape[1:]:
            raise StageError("load", f"tensorrt: only the batch may be free, model input {value.name!r} is {shape}")
        if shape[:1] == (-1,):
            one, most = (1, *shape[1:]), (max_batch, *shape[1:])
            profile.set_shape(value.name, one, one, most)
    config.add_optimization_profile(profile)


def _deadline(seconds: float) -> Any:
    """A progress monitor that ends a build after so long, and then says `passed`."""
    trt: Any = require("tensorrt", "tensorrt")

    class Deadline(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.passed = False
            self._end = time.monotonic() + seconds

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002 - the interface's
            self.passed = self.passed or time.monotonic() > self._end
            return not self.passed

    return Deadline()


def _computing(trt: Any, network: Any) -> frozenset[str]:
    """Names of the ONNX nodes behind the layers that compute."""
    kinds = {getattr(trt.LayerType, name) for name in _COMPUTING if hasattr(trt.LayerType, name)}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return frozenset(name for layer in layers if layer.type in kinds for name in onnx_names(layer.metadata))


def onnx_names(metadata: str) -> list[str]:
    """The ONNX nodes that a layer was made of: its importer notes "[ONNX Layer: name | …]" for each."""
    return re.findall(r"\[ONNX Layer: ([^|\]]+?)(?: \||\])", metadata)


def _pack(engine: Engine) -> bytes:
    return json.dumps(sorted(engine.computing)).encode() + b"\n" + engine.data


def _unpack(data: bytes) -> Engine:
    names, _, engine = data.partition(b"\n")
    return Engine(data=engine, computing=frozenset(json.loads(names)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other thread or process that keeps its engines in this folder is inside at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)

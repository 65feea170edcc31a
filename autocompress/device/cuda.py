"""Buffers, streams and events of a CUDA device, through cuda-bindings.

One device: the first of those that are visible; CUDA_VISIBLE_DEVICES says which.
"""

from typing import Any

from autocompress.core.errors import StageError, TargetError
from autocompress.core.extras import require
from autocompress.device.runtime import Array

DEVICE = 0


def call(name: str, *arguments: Any, stage: str = "measure") -> Any:
    """A function of CUDA's runtime: what it gives behind its status, None for nothing.

    Raises:
        StageError: its status is not success.
        TargetError: cuda-bindings is not installed.
    """
    runtime = _runtime()
    status, *values = getattr(runtime, name)(*arguments)
    if int(status) != 0:
        raise StageError(stage, f"cuda: {name} fails: {_said(runtime, status)}")
    return values[0] if values else None


def unusable() -> str | None:
    """Why no device can be used here, one sentence; None where one can."""
    try:
        runtime = _runtime()
        status, count = runtime.cudaGetDeviceCount()
    except (TargetError, ImportError, RuntimeError) as error:  # not installed, or no CUDA library to bind to
        return str(error)
    if int(status) != 0:
        return f"no CUDA device: {_said(runtime, status)}"
    return None if count else "no CUDA device: none is visible"


def bus_id() -> str:
    """The device's address on the PCI bus, by which NVML knows it too."""
    found = call("cudaDeviceGetPCIBusId", 16, DEVICE, stage="load")
    return str(found.decode("ascii").rstrip("\0"))


def facts() -> dict[str, str]:
    """What of the device decides which kernels run: its name, compute capability, memory, and the versions."""
    properties = call("cudaGetDeviceProperties", DEVICE, stage="load")
    return {
        "device": properties.name.decode("utf-8").rstrip("\0"),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "device_memory": f"{properties.totalGlobalMem / 2**30:.1f} GiB",
        "multiprocessors": str(properties.multiProcessorCount),
        "cuda": _version(call("cudaRuntimeGetVersion", stage="load")),
        "cuda_driver": _version(call("cudaDriverGetVersion", stage="load")),
    }


def used_memory() -> int:
    """Bytes of the device's memory in use now, by whomever."""
    runtime = _runtime()
    status, free, total = runtime.cudaMemGetInfo()
    if int(status) != 0:
        raise StageError("memory", f"cuda: cudaMemGetInfo fails: {_said(runtime, status)}")
    return int(total - free)


class Stream:
    """Work in order on the device, buffers by name, and an event to wait for."""

    def __init__(self) -> None:
        self.handle: Any = call("cudaStreamCreate", stage="load")
        self._event: Any = call("cudaEventCreateWithFlags", _runtime().cudaEventDisableTiming, stage="load")
        self._buffers: dict[str, tuple[Any, int]] = {}

    def buffer(self, name: str, size: int) -> int:
        """The address of a buffer of at least `size` bytes; it stays until a larger one of that name is asked for."""
        pointer, has = self._buffers.get(name, (None, 0))
        if pointer is None or has < size:
            if pointer is not None:
                call("cudaFree", pointer)
                del self._buffers[name]
            pointer = call("cudaMalloc", max(1, size))
            self._buffers[name] = pointer, size
        return int(pointer)

    def upload(self, name: str, array: Array) -> None:
        """Copy a contiguous array to its buffer, in order."""
        self._copy(self._buffers[name][0], array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, name: str, array: Array) -> None:
        """Copy a buffer to a contiguous array, in order; it is there after `wait`."""
        self._copy(array.ctypes.data, self._buffers[name][0], array.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Until all that was asked for is done."""
        call("cudaEventRecord", self._event, self.handle)
        call("cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Give everything back."""
        for pointer, _ in self._buffers.values():
            call("cudaFree", pointer)
        self._buffers.clear()
        call("cudaEventDestroy", self._event)
        call("cudaStreamDestroy", self.handle)

    def _copy(self, target: Any, source: Any, size: int, kind: str) -> None:
        call("cudaMemcpyAsync", target, source, size, getattr(_runtime().cudaMemcpyKind, kind), self.handle)


def _runtime() -> Any:
    return require("cuda.bindings.runtime", "tensorrt")


def _said(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return str(text.decode("utf-8"))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

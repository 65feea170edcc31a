"""The calls of the CUDA runtime that `predict_tensorrt.py` makes, in ordinary memory, which is 64 allocations."""

import ctypes
from enum import Enum

_ALIVE, _MOST = {}, 64


class cudaError_t(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class cudaMemcpyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


def cudaStreamCreate():
    return cudaError_t.cudaSuccess, 7


def cudaMalloc(size):
    if len(_ALIVE) == _MOST:
        return cudaError_t.cudaErrorMemoryAllocation, None
    buffer = ctypes.create_string_buffer(size)
    _ALIVE[ctypes.addressof(buffer)] = buffer
    return cudaError_t.cudaSuccess, ctypes.addressof(buffer)


def cudaMemcpy(target, source, size, kind):
    assert (target in _ALIVE) == (kind is cudaMemcpyKind.cudaMemcpyHostToDevice)
    ctypes.memmove(target, source, size)
    return (cudaError_t.cudaSuccess,)


def cudaStreamSynchronize(stream):
    assert stream == 7
    return (cudaError_t.cudaSuccess,)


def cudaFree(address):
    del _ALIVE[address]
    return (cudaError_t.cudaSuccess,)

"""The calls of TensorRT that `predict_tensorrt.py` makes: its network doubles input `x` into output `y`.

A file named `unreadable` is not read, `unbuildable` has no engine, and one named `sparse` must have its flag set.
"""

import ctypes
from enum import IntEnum
from pathlib import Path

import numpy as np


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    SPARSE_WEIGHTS = 15
    TF32 = 7


class Logger:
    WARNING = 2

    def __init__(self, severity):
        assert severity == self.WARNING


def nptype(dtype):
    return dtype


class Tensor:
    name, shape = "x", (-1, 2)


class Network:
    num_inputs = 1

    def get_input(self, index):
        return Tensor()


class OnnxParser:
    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        self.network.name = Path(path).name
        return self.network.name != "unreadable"

    def get_error(self, index):
        return "no such operator"


class Profile:
    def set_shape(self, name, low, best, high):
        assert (name, low, best, high) == ("x", (1, 2), (1, 2), (1, 2))


class Config:
    def __init__(self):
        self.flags, self.profiles = {BuilderFlag.TF32}, []

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.remove(flag)


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        assert config.profiles
        assert BuilderFlag.TF32 not in config.flags
        assert (BuilderFlag.SPARSE_WEIGHTS in config.flags) == (network.name == "sparse")
        return None if network.name == "unbuildable" else b"engine"


class Context:
    def __init__(self):
        self.addresses = {}

    def set_input_shape(self, name, shape):
        assert (name, shape) == ("x", (1, 2))

    def get_tensor_shape(self, name):
        assert name == "y"
        return (1, 2)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        x, y = (np.ctypeslib.as_array((ctypes.c_float * 2).from_address(self.addresses[n])) for n in "xy")
        y[:] = 2 * x
        return True


class Engine:
    def create_execution_context(self):
        return Context()

    def get_tensor_dtype(self, name):
        return np.float32


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        assert data == b"engine"
        return Engine()

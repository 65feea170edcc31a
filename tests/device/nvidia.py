"""NVIDIA's modules as far as they are called, by hand: the documented behaviour of TensorRT, CUDA's runtime and NVML.

TensorRT's engine is the ONNX file itself, run by ONNX Runtime on what lies at the addresses it is given, without
optimisations. It keeps what the real one is strict about: a strongly typed network, types and zero points its importer
takes, shapes within the profile, an address for every tensor.
"""

import ctypes
import enum
import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

BUS = "0000:01:00.0"


def install(monkeypatch: pytest.MonkeyPatch) -> "Gpu":
    """Put the modules where imports find them."""
    gpu = Gpu()
    for name, content in (("tensorrt", _tensorrt(gpu)), ("cuda.bindings.runtime", _cuda(gpu)), ("pynvml", _nvml(gpu))):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return gpu


class Gpu:
    """What the tests set and see."""

    def __init__(self) -> None:
        self.status: dict[str, int] = {}
        self.devices = 1
        self.capability = (8, 9)
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.builds: list[dict[str, Any]] = []
        self.step: Callable[[], None] = lambda: None
        self.builder_says: str | None = None
        self.parsing = True
        self.executes = True
        self.energy_mj = 1000
        self.nvml_fails: set[str] = set()
        self.clock_reasons = 0
        self.utilization = 0


class Status(enum.IntEnum):
    SUCCESS = 0
    OUT_OF_MEMORY = 2
    NO_DRIVER = 35


def _cuda(gpu: Gpu) -> dict[str, Any]:
    def status(name: str) -> Status:
        return Status(gpu.status.get(name, 0))

    def function(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> tuple[Any, ...]:
            if status(name):
                return (status(name), None)
            result = work(*arguments)
            return (Status.SUCCESS,) if result is None else (Status.SUCCESS, result)

        return called

    def malloc(size: int) -> int:
        block = ctypes.create_string_buffer(size)
        gpu.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(pointer: int) -> None:
        del gpu.memory[pointer]

    def copy(target: int, source: int, size: int, kind: str, stream: int) -> None:
        assert stream in gpu.streams
        device = target if kind == "to device" else source
        assert len(gpu.memory[device]) >= size
        ctypes.memmove(target, source, size)

    def stream() -> int:
        gpu.streams.add(len(gpu.streams) + 1)
        return len(gpu.streams)

    class Properties:
        name = b"Fake GPU\0\0"
        totalGlobalMem = 8 * 2**30
        multiProcessorCount = 4

        def __init__(self) -> None:
            self.major, self.minor = gpu.capability

    works: dict[str, Callable[..., Any]] = {
        "cudaGetDeviceCount": lambda: gpu.devices,
        "cudaGetDeviceProperties": lambda _: Properties(),
        "cudaRuntimeGetVersion": lambda: 13050,
        "cudaDriverGetVersion": lambda: 13010,
        "cudaDeviceGetPCIBusId": lambda _length, _device: f"{BUS}\0\0".encode(),
        "cudaMalloc": malloc,
        "cudaFree": free,
        "cudaMemcpyAsync": copy,
        "cudaStreamCreate": stream,
        "cudaStreamDestroy": gpu.streams.remove,
        "cudaEventCreateWithFlags": lambda flags: 7 if flags == 2 else None,
        "cudaEventRecord": lambda event, stream: None if event == 7 and stream in gpu.streams else 1 / 0,
        "cudaEventSynchronize": lambda _: None,
        "cudaEventDestroy": lambda _: None,
    }
    made = {name: function(name, work) for name, work in works.items()}
    made["cudaGetErrorString"] = lambda code: (Status.SUCCESS, f"status {int(code)}".encode())
    made["cudaMemGetInfo"] = lambda: (status("cudaMemGetInfo"), 2**20 - sum(map(len, gpu.memory.values())), 2**20)

    class Kind:
        cudaMemcpyHostToDevice = "to device"
        cudaMemcpyDeviceToHost = "to host"

    return {**made, "cudaMemcpyKind": Kind, "cudaEventDisableTiming": 2}


def _nvml(gpu: Gpu) -> dict[str, Any]:
    class NVMLError(Exception):
        pass

    def function(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if name in gpu.nvml_fails:
                raise NVMLError("Not Supported")
            return work(*arguments)

        return called

    def handle(bus: str) -> str:
        assert bus == BUS
        return "gpu"

    class Rates:
        @property
        def gpu(self) -> int:
            return gpu.utilization

    works: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByPciBusId": handle,
        "nvmlSystemGetDriverVersion": lambda: b"999.1",
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 72_500,
        "nvmlDeviceGetMaxClockInfo": lambda _gpu, kind: {1: 2100}[kind],
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: gpu.energy_mj,
        "nvmlDeviceGetUtilizationRates": lambda _: Rates(),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: gpu.clock_reasons,
    }
    return {
        **{name: function(name, work) for name, work in works.items()},
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "nvmlClocksEventReasonSwPowerCap": 4,
        "nvmlClocksEventReasonHwSlowdown": 8,
        "nvmlClocksEventReasonSwThermalSlowdown": 32,
        "nvmlClocksEventReasonHwThermalSlowdown": 64,
        "nvmlClocksEventReasonHwPowerBrakeSlowdown": 128,
    }


class Logger:
    """Severities, and a base that must be initialised."""

    INTERNAL_ERROR, ERROR, WARNING = "internal error", "error", "warning"

    def __init__(self) -> None:
        self.ready = True


class Monitor:
    """The base of progress monitors."""

    def __init__(self) -> None:
        self.ready = True


class HostMemory:
    """Bytes that are not `bytes`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class Layer:
    def __init__(self, node: onnx.NodeProto) -> None:
        self.type = {"Conv": "convolution", "MatMul": "product", "Gemm": "product", "Gather": "gather"}.get(
            node.op_type, "other"
        )
        self.metadata = f"[ONNX Layer: {node.name} | pkg: torch]"


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
        self.dtype = value.type.tensor_type.elem_type


class Network:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model.graph.input[index])

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> Layer:
        return Layer(self.model.graph.node[index])


class Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, least: tuple[int, ...], best: tuple[int, ...], most: tuple[int, ...]) -> None:
        self.shapes[name] = (least, best, most)


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> HostMemory:
        return HostMemory(self.data + b"+")


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profile = Profile()
        self.cache: TimingCache | None = None
        self.progress_monitor: Any = None
        self.profiling_verbosity: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profile = profile
        return 0

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache is not None
        return self.cache


def _refused(model: onnx.ModelProto) -> str | None:
    """What the importer says of types and zero points that it does not take."""
    values = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = values[node.input[2]]
            if zero.data_type not in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
                return f"In node {node.name}: TensorRT only allows FP8, INT8, INT4 and FP4 quantization"
            if numpy_helper.to_array(zero).astype(np.float32).any():
                return f"In node {node.name}: Non-zero zero point is not supported."
    return None


def _description(model: onnx.ModelProto) -> dict[str, Any]:
    """As an engine inspector tells it, in words it is known to use."""
    values = {t.name: t.data_type for t in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    layers: list[Any] = ["a layer by its name only", {"Name": "Reformatting CopyNode", "LayerType": "Reformat"}]
    for node in model.graph.node:
        quantized = node.input and node.input[0] in made and made[node.input[0]].op_type == "DequantizeLinear"
        half = any(values.get(i) == TensorProto.FLOAT16 for i in node.input)
        kind = "Thirty-two wide channel vectorized row major Int8 format" if quantized else "Half" if half else "Float"
        layers.append(
            {
                "Name": f"{node.name} + fused",
                "LayerType": "CaskConvolution" if node.op_type == "Conv" else node.op_type.lower(),
                "Inputs": [{"Name": "x", "Format/Datatype": kind}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Float"}],
                "Metadata": f"[ONNX Layer: {node.name} | pkg: torch]\x1f[ONNX Layer: {node.name}.fused]",
            }
        )
    return {"Layers": layers, "Bindings": []}


def _tensorrt(gpu: Gpu) -> dict[str, Any]:
    class Builder:
        def __init__(self, logger: Logger) -> None:
            assert logger.ready
            self._logger: Any = logger

        def create_network(self, flags: int) -> Network:
            assert flags == 1 << 1, "the network is strongly typed"
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
            assert config.progress_monitor.ready
            assert config.profiling_verbosity == "detailed"
            assert config.cache is not None
            gpu.builds.append({"flags": set(config.flags), "timing": config.cache.data})
            for i in range(3):
                gpu.step()
                if not config.progress_monitor.step_complete("Building", i):
                    return None
            if gpu.builder_says is not None:
                self._logger.log(Logger.WARNING, "not this one")
                self._logger.log(Logger.ERROR, gpu.builder_says)
                return None
            shapes = json.dumps(config.profile.shapes).encode()
            return HostMemory(b"engine\n" + shapes + b"\n" + network.model.SerializeToString())

    class OnnxParser:
        def __init__(self, network: Network, logger: Logger) -> None:
            assert logger.ready
            self._network = network
            self._errors: list[Error] = []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Error:
            return self._errors[index]

        def parse(self, data: bytes) -> bool:
            try:
                model = onnx.load_from_string(data)
                if not model.graph.node:
                    raise ValueError("no graph")
            except Exception as error:  # whatever protobuf says
                self._errors.append(Error(f"Failed to parse ONNX model: {error}"))
                return False
            if said := _refused(model):
                self._errors.append(Error(said))
                return False
            self._network.model = model
            return gpu.parsing

    class Context:
        def __init__(self, engine: "CudaEngine") -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            bounds = self._engine.shapes.get(name)
            self._shapes[name] = shape
            return bounds is None or all(a <= n <= b for a, n, b in zip(bounds[0], shape, bounds[2], strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert name in self._engine.names
            self._addresses[name] = address
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if n == -1 and i == 0 else n for i, n in enumerate(self._engine.get_tensor_shape(name)))

        def execute_async_v3(self, stream: int) -> bool:
            assert stream in gpu.streams
            engine = self._engine
            feeds = {n: self._at(n, self._shapes[n]) for n in engine.names if n in engine.inputs}
            outputs = [n for n in engine.names if n not in engine.inputs]
            for name, value in zip(outputs, engine.session.run(outputs, feeds), strict=True):
                self._at(name, value.shape)[...] = value
            return gpu.executes

        def _at(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(nptype(self._engine.get_tensor_dtype(name)))
            size = int(np.prod(shape)) * dtype.itemsize
            block = gpu.memory[self._addresses[name]]
            assert len(block) >= size
            return np.frombuffer(block, dtype, count=size // dtype.itemsize).reshape(shape)

    class Inspector:
        def __init__(self, model: onnx.ModelProto) -> None:
            self._model = model
            self.execution_context: Any = None

        def get_engine_information(self, form: str) -> str:
            assert (form, type(self.execution_context)) == ("json", Context)
            return json.dumps(_description(self._model))

    class CudaEngine:
        def __init__(self, data: bytes) -> None:
            _, shapes, model = data.split(b"\n", 2)
            self.shapes: Mapping[str, Any] = json.loads(shapes)
            self.model = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
            values = [*self.model.graph.input, *self.model.graph.output]
            self.tensors = {v.name: Tensor(v) for v in values}
            self.inputs = {v.name for v in self.model.graph.input}
            self.names = list(self.tensors)
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 4
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        @property
        def num_io_tensors(self) -> int:
            return len(self.names)

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> str:
            return "input" if name in self.inputs else "output"

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.tensors[name].shape

        def get_tensor_dtype(self, name: str) -> int:
            return self.tensors[name].dtype

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            return [tuple(shape) for shape in self.shapes[name]]

        def create_execution_context(self) -> Context | None:
            return Context(self)

        def create_engine_inspector(self) -> Inspector:
            return Inspector(self.model)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
            if not data.startswith(b"engine\n"):
                self._logger.log(Logger.ERROR, "Serialization assertion failed")
                return None
            return CudaEngine(data)

    def nptype(kind: int) -> Any:
        if kind == TensorProto.BFLOAT16:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return onnx.helper.tensor_dtype_to_np_dtype(kind)

    def names(**members: Any) -> type:
        return type("Names", (), members)

    class Flags:
        STRONGLY_TYPED: ClassVar[int] = 1

    return {
        "__version__": "10.16.1",
        "ILogger": Logger,
        "IProgressMonitor": Monitor,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "nptype": nptype,
        "NetworkDefinitionCreationFlag": Flags,
        "BuilderFlag": names(SPARSE_WEIGHTS="SPARSE_WEIGHTS", TF32="TF32"),
        "ProfilingVerbosity": names(DETAILED="detailed"),
        "LayerInformationFormat": names(JSON="json"),
        "TensorIOMode": names(INPUT="input", OUTPUT="output"),
        "LayerType": names(CONVOLUTION="convolution", MATRIX_MULTIPLY="product", GATHER="gather"),
    }

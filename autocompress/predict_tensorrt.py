"""What `predict.py` needs of TensorRT: `tensorrt` and `cuda-bindings`, which are all it needs beside numpy.

Written to the documented API of TensorRT 10 and 11, and never run on a GPU by its authors.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt  # type: ignore[import-not-found]  # it comes from NVIDIA's own index
from cuda.bindings import runtime as cudart  # type: ignore[import-untyped]  # it has no stubs


def open_model(
    path: Path, options: Mapping[str, Any], outputs: Sequence[str]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from arrays by input name to arrays by output name, which takes item by item.

    The engine is built here, on this GPU and for one item, as it was measured; that takes seconds to minutes.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    engine = trt.Runtime(logger).deserialize_cuda_engine(_engine(path, options, logger))
    if engine is None:
        raise ValueError(f"TensorRT does not load the engine that it built of {path}")
    context, stream = engine.create_execution_context(), _checked(cudart.cudaStreamCreate())

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        count = len(next(iter(inputs.values())))
        items = [_run({n: a[i : i + 1] for n, a in inputs.items()}) for i in range(count)]
        return {name: np.concatenate([item[name] for item in items]) for name in outputs}

    def _run(item: Mapping[str, Any]) -> dict[str, Any]:
        for name, array in item.items():
            context.set_input_shape(name, array.shape)
        made = {n: np.empty(context.get_tensor_shape(n), trt.nptype(engine.get_tensor_dtype(n))) for n in outputs}
        arrays = {**item, **made}
        memory = {name: _checked(cudart.cudaMalloc(max(1, array.nbytes))) for name, array in arrays.items()}
        try:
            for name, array in arrays.items():
                context.set_tensor_address(name, memory[name])
                if name in item:
                    _copy(memory[name], array.ctypes.data, array.nbytes, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
            if not context.execute_async_v3(stream):
                raise ValueError("TensorRT did not run the model")
            _checked(cudart.cudaStreamSynchronize(stream))
            for name, array in made.items():
                _copy(array.ctypes.data, memory[name], array.nbytes, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        finally:
            for address in memory.values():
                _checked(cudart.cudaFree(address))
        return made

    return run


def _engine(path: Path, options: Mapping[str, Any], logger: Any) -> Any:
    """The serialized engine: types as the file has them, every free size one."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ValueError(f"TensorRT does not read {path}: {parser.get_error(0)}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(1 if size < 0 else size for size in tensor.shape)
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if options.get("sparse_weights"):
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not options.get("tf32"):  # which TensorRT takes for float32 by default
        config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT does not build an engine of {path}: its messages say why")
    return engine


def _copy(target: int, source: int, size: int, kind: Any) -> None:
    _checked(cudart.cudaMemcpy(target, source, size, kind))


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call to the CUDA runtime, which returns its error first."""
    if result[0] != cudart.cudaError_t.cudaSuccess:
        raise OSError(f"CUDA fails: {result[0]}")
    return result[1] if len(result) > 1 else None

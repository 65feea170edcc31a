"""What `predict.py` needs of OpenVINO, which is all it needs beside numpy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino  # type: ignore[import-untyped]  # it has no stubs


def open_model(
    path: Path, options: Mapping[str, Any], outputs: Sequence[str]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from arrays by input name to arrays by output name.

    The model is compiled for each shape of inputs that comes: a free batch size is slower on small models.
    """
    core, device = openvino.Core(), str(options.get("device", "CPU"))
    model = core.read_model(path)
    names = [port.get_node().get_friendly_name() for port in model.inputs]
    writable = core.get_property(device, "SUPPORTED_PROPERTIES")
    wanted = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": int(options["threads"]),
        "INFERENCE_PRECISION_HINT": str(options.get("inference_precision", "f32")),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    settings = {name: value for name, value in wanted.items() if writable.get(name) == "RW"}
    if "cache_dir" in options:
        settings["CACHE_DIR"] = str(Path(str(options["cache_dir"])).expanduser())
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = [inputs[name] for name in names]
        shapes = tuple(array.shape for array in arrays)
        if shapes not in compiled:
            shaped = model.clone()
            shaped.reshape(dict(enumerate(shapes)))
            compiled[shapes] = core.compile_model(shaped, device, settings)
        return dict(zip(outputs, compiled[shapes](arrays).values(), strict=True))

    return run

"""ONNX Runtime."""

from pathlib import Path

from autocompress.device.onnxruntime import OnnxRuntime
from tests.contracts.cases import Case
from tests.contracts.onnx_files import onnx_case


def case(folder: Path) -> Case:
    """On ONNX files."""
    return onnx_case(OnnxRuntime(), folder)

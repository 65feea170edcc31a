"""OpenVINO."""

from pathlib import Path

from autocompress.device.openvino import OpenVino
from tests.contracts.cases import Case
from tests.contracts.onnx_files import onnx_case


def case(folder: Path) -> Case:
    """On ONNX files."""
    return onnx_case(OpenVino(), folder)

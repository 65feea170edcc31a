"""Optional dependencies: imported on use, and named with the line that installs them."""

import importlib
from types import ModuleType

from autocompress.core.errors import TargetError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise TargetError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise TargetError(f"{module} is not installed. Install it with: pip install 'autocompress[{extra}]'") from error

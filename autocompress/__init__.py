"""Hardware-aware search for compressed models. Names are loaded on first use: importing costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.driver import search
    from autocompress.run import Run, open_run
    from autocompress.task import Task

__version__ = "0.4.3"

_HOMES = {
    "Run": "autocompress.run",
    "Task": "autocompress.task",
    "open_run": "autocompress.run",
    "search": "autocompress.driver",
}

__all__ = ["Run", "Task", "open_run", "search"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

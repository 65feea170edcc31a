"""A Python object by reference: `file.py`, `file.py:name` or `module:name`."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from autocompress.core.errors import TaskError, unknown
from autocompress.tasks.items import blame

T = TypeVar("T")


def load_object(ref: str, kind: type[T], built_in: Mapping[str, str]) -> T:
    """The `kind` that `ref` names: a key of `built_in` (name → module), `file.py`, `file.py:name` or `module:name`.

    Without a name it is called `task`. It is a `kind`, or a function without arguments that returns one.

    Raises:
        TaskError: there is no such object, or its own code raises.
    """
    where, _, name = ref.partition(":")
    folder = Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
    name = name or "task"
    with _on_path(folder):
        if ref in built_in:
            module = importlib.import_module(built_in[ref])
        elif where.endswith(".py"):
            module = _load_file(Path(where))
        elif ":" in ref:
            with blame(f"module {where!r} cannot be imported"):
                module = importlib.import_module(where)
        else:
            forms = "A task is one of these names, file.py, file.py:name or module:name."
            raise TaskError(f"{unknown('task', ref, built_in)} {forms}")
        if not hasattr(module, name):
            found = [key for key, value in vars(module).items() if isinstance(value, kind)]
            hint = f"it has {', '.join(found)}: use {where}:{found[0]}" if found else f"assign it: {name} = Task(...)"
            raise TaskError(f"{where} has no `{name}`; {hint}")
        value = getattr(module, name)
        if callable(value):
            with blame(f"`{name}` in {where} fails"):
                value = value()
    if not isinstance(value, kind):
        got = type(value).__name__
        raise TaskError(f"`{name}` in {where} must be a {kind.__name__} or a function returning one, got {got}")
    return value


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"task file {path} is not a file" if path.exists() else f"task file {path} does not exist")
    key = f"autocompress_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses and pickle look a class's module up here
    try:
        with blame(f"task file {path} fails"):
            spec.loader.exec_module(module)
    except TaskError:
        del sys.modules[key]
        raise
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """`folder` comes first on `sys.path`, as if Python ran a file in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))

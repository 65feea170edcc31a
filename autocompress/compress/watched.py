"""Seeing what a model's modules get and give while it runs."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

Look = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


@contextlib.contextmanager
def watched(model: nn.Module, names: Iterable[str], look: Look) -> Iterator[None]:
    """Within it, `look` is told of every forward of these modules: name, module, positional inputs and output.

    It may raise, which ends the model's forward.
    """
    modules = [(name, model.get_submodule(name)) for name in names]
    handles = [module.register_forward_hook(functools.partial(_tell, look, name)) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(look: Look, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    look(name, module, inputs, output)

"""Frozen values to JSON and back, strictly.

A record is a dataclass; its JSON form is an object with the same keys.
Reading refuses what writing would not have produced: an unknown key, a missing one, a wrong type.
Top-level records carry a schema number; one newer than known is refused with a sentence that says so.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from autocompress.core.errors import InputError, unknown

T = TypeVar("T")
RARE: Mapping[str, bool] = types.MappingProxyType({"rare": True})


def to_json(value: Any) -> Any:
    """The JSON form of a value: dataclass → object, tuple → array; a float that is not finite is refused.

    A field whose metadata is RARE is written only where it is not its default: that keeps records short, and equal to
    those of versions that did not have it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if _told(f, value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"a record holds finite numbers only, got {value}")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise InputError(f"a record cannot hold a {type(value).__name__}")


def _told(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.metadata != RARE:
        return True
    made = field.default_factory
    return bool(getattr(value, field.name) != (field.default if made is dataclasses.MISSING else made()))


def from_json(cls: type[T], data: Any) -> T:
    """A `cls` from its JSON form.

    Raises:
        InputError: the data is not the JSON form of a `cls`.
    """
    return typing.cast(T, _read(cls, data, cls.__name__))


def dump(value: Any, schema: int) -> dict[str, Any]:
    """The JSON form of a top-level record, with its schema number first."""
    return {"schema": schema, **to_json(value)}


def load(cls: type[T], data: Any, schema: int) -> T:
    """A top-level record from its JSON form; refuses a schema newer than `schema`."""
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise InputError(f"not a {cls.__name__} record: there is no integer `schema` in it")
    if data["schema"] > schema:
        raise InputError(
            f"this {cls.__name__} record has schema {data['schema']}, newer than the {schema} known here: "
            "upgrade autocompress to read it"
        )
    return from_json(cls, {k: v for k, v in data.items() if k != "schema"})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, data, where)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, data, where)
    if origin is typing.Literal:
        if data not in args:
            raise InputError(f"`{where}` must be one of {list(args)}, got {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise InputError(f"`{where}` must be a list, got {data!r}")
        if args[-1] is Ellipsis:
            if args[0] is float and all(map(_is_number, data)):  # raw samples: thousands a trial
                return tuple(data)
            return tuple(_read(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
        if len(data) != len(args):
            raise InputError(f"`{where}` must have {len(args)} items, got {len(data)}")
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise InputError(f"`{where}` must be an object, got {data!r}")
        return {str(k): _read(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not math.isfinite(data):  # Python's own JSON reader knows NaN and Infinity
            raise InputError(f"`{where}` must be a finite number, got {data}")
        return float(data)
    if hint is type(None) and data is None:
        return None
    if isinstance(hint, type) and isinstance(data, hint) and (hint is bool or not isinstance(data, bool)):
        return data
    raise InputError(f"`{where}` must be {getattr(hint, '__name__', hint)}, got {data!r}")


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _read_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"`{where}` must be an object, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise InputError(f"`{where}`: {unknown('key', str(key), fields)}")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in data and not optional:
            raise InputError(f"`{where}.{name}` is missing")
    hints = _hints(cls)
    return cls(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _read_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    errors = []
    for option in options:
        try:
            return _read(option, data, where)
        except InputError as error:
            errors.append(str(error))
    raise InputError(errors[0])

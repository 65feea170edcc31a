"""Profiles, search spaces and recipes: YAML files to core values, strictly.

A name means a shipped file, found beside the package in a source checkout and inside it in an installed wheel;
anything that ends in `.yaml` or `.yml` is a path. Every fault is one ConfigError: file, key, value, way out.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from autocompress.core.errors import ConfigError, unknown
from autocompress.core.profile import Profile
from autocompress.core.recipe import Plan
from autocompress.core.space import KINDS, SpaceRules

T = TypeVar("T")
Folder = Literal["hardware_profiles", "search_spaces", "recipes"]


def load_profile(name_or_path: str) -> Profile:
    """The profile of a shipped name or of a YAML file.

    Raises:
        ConfigError: there is no such profile, or the file does not say what a profile must.
    """
    path = _locate(name_or_path, "hardware_profiles", "target")
    profile = _load(path, Profile)
    for kind in profile.precisions:
        if kind not in KINDS:
            raise ConfigError(f"{path}: `precisions`: {unknown('layer kind', kind, KINDS)}")
    return profile


def load_space(name_or_path: str) -> SpaceRules:
    """The search space of a shipped name or of a YAML file; recipes that it names are read too.

    Raises:
        ConfigError: there is no such space or recipe, or the file does not say what a space must.
    """
    path = _locate(name_or_path, "search_spaces", "space")
    data = _read(path)
    if isinstance(data, dict) and isinstance(data.get("recipes"), list):
        data["recipes"] = [_recipe(path, named) for named in data["recipes"]]
    return _checked(path, data, SpaceRules)


def load_recipe(name_or_path: str) -> Plan:
    """The recipe of a shipped name or of a YAML file.

    Raises:
        ConfigError: there is no such recipe, or the file does not say what a recipe must.
    """
    return _load(_locate(name_or_path, "recipes", "recipe"), Plan)


def _recipe(space: Path, named: Any) -> Any:
    """What a space lists as a recipe: its own words, or those of the recipe it names, files relative to the space."""
    if not isinstance(named, str):
        return named
    if named.endswith((".yaml", ".yml")):
        named = str(space.parent / named)
    return _read(_locate(named, "recipes", "recipe"))


def profile_names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return _names("hardware_profiles")


def space_names() -> tuple[str, ...]:
    """Names of the shipped search spaces, sorted."""
    return _names("search_spaces")


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return _names("recipes")


def profile_file(name_or_path: str) -> Path:
    """The YAML file of a profile.

    Raises:
        ConfigError: there is no such profile.
    """
    return _locate(name_or_path, "hardware_profiles", "target")


@functools.cache
def _folder(folder: Folder) -> Path:
    package = Path(__file__).resolve().parent
    for path in (package / folder, package.parent / folder):
        if path.is_dir():
            return path
    raise ConfigError(f"the folder {folder} is missing from this installation: install autocompress again")


def _names(folder: Folder) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _folder(folder).glob("*.yaml")))


def _locate(name_or_path: str, folder: Folder, what: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(
                f"{what} file {name_or_path!r} does not exist; shipped names: {', '.join(_names(folder))}"
            )
        return path
    if name_or_path not in _names(folder):
        raise ConfigError(unknown(what, name_or_path, _names(folder)))
    return _folder(folder) / f"{name_or_path}.yaml"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(path: Path, cls: type[T]) -> T:
    return _checked(path, _read(path), cls)


def _checked(path: Path, data: Any, cls: type[T]) -> T:
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected, got {_shown(data)}")
    try:  # as JSON, where pydantic's strict mode takes a list for a tuple and still no "8" for 8
        return TypeAdapter(cls).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        faults = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")  # a typo comes first
        raise ConfigError(f"{path}: {_sentence(faults[0], cls, data)}") from None


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}: not valid YAML{line}: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _sentence(error: ErrorDetails, cls: type, data: Any) -> str:
    place, value, owner = _walk(cls, data, error["loc"])
    where = f"`{place}`: " if place else ""
    if error["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(owner)]
        return f"{where}{unknown('key', str(error['loc'][-1]), known)}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}the key {str(error['loc'][-1])!r} is missing"
    if error["type"] == "value_error":
        return f"{where}{error['ctx']['error']}"
    said = error["msg"].removeprefix("Input ")
    return f"{where}{said}, got {_shown(value)}"


def _walk(cls: type, data: Any, loc: tuple[int | str, ...]) -> tuple[str, Any, type]:
    """Key path, value and innermost dataclass at `loc`, as far as it lies in the data (pydantic adds union tags)."""
    place, owner, hint = "", cls, cls
    for key in loc:
        hint = _inner(hint, key)
        if isinstance(data, Mapping) and key in data and hint is not None:
            data, place = data[key], f"{place}.{key}" if place else str(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data, place = data[key], f"{place}[{key}]"
        else:
            break
        if dataclasses.is_dataclass(hint):
            owner = hint
    return place, data, owner


def _inner(hint: Any, key: int | str) -> Any:
    """The type of what lies under `key` in a value of type `hint`; None for a key its dataclass does not have."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return typing.get_type_hints(hint).get(str(key))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((inner for a in typing.get_args(hint) if (inner := _inner(a, key)) is not None), None)
    args = [a for a in typing.get_args(hint) if a is not Ellipsis]
    return args[-1] if args else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

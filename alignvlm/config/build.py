"""From a tree of YAML values to the schema's dataclasses, strictly: names, types, literals, ranges. No files here."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Annotated, Any, Literal, Union

from alignvlm.config.schema import Bounds
from alignvlm.config.tree import Value, join
from alignvlm.errors import UserError
from data_pipeline.errors import did_you_mean, nearest

NONE = type(None)


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Field name -> type with its `Bounds`, in the order of the schema."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def build(section: type, tree: Value, key: str = "", origins: dict[str, str] | None = None) -> Any:
    """Build the dataclass `section` from a mapping.

    `origins` collects dotted key -> place, for errors found later.
    Raises UserError naming place, key, value and what is allowed.
    """
    origins = {} if origins is None else origins
    if not isinstance(tree.data, dict):
        raise _wrong(tree, key, "a mapping of keys to values")
    known = field_types(section)
    values: dict[str, Any] = {}
    for name, child in tree.data.items():
        if name not in known:
            raise UserError(f"{child.where}: unknown key {join(key, name)!r}: {nearest(name, known)}")
        values[name] = convert(known[name], child, join(key, name), origins)
    return section(**values)


def convert(kind: Any, value: Value, key: str, origins: dict[str, str]) -> Any:
    """One value of the type `kind`; see `build`."""
    origins[key] = value.where
    data = value.data
    bounds: Bounds | None = None
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        inner = next(argument for argument in arguments if argument is not NONE)
        return convert(inner, value, key, origins)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, key, origins)
    if kind is Any:
        return value.plain()
    if origin is dict:
        return _convert_mapping(arguments[1], value, key, origins)
    if origin is list:
        items = _items(value, key)
        return [convert(arguments[0], item, f"{key}[{i}]", origins) for i, item in enumerate(items)]
    if origin is tuple:
        items = _items(value, key)
        if len(items) != len(arguments):
            raise _wrong(value, key, f"a list of {len(arguments)} values")
        return tuple(convert(arguments[i], item, f"{key}[{i}]", origins) for i, item in enumerate(items))
    if origin is Literal:
        if data not in arguments or isinstance(data, bool):
            allowed = [str(argument) for argument in arguments]
            hint = did_you_mean(str(data), allowed)
            raise _wrong(value, key, f"one of {', '.join(allowed)}", f"; {hint}" if hint else "")
        return data
    return _convert_scalar(kind, bounds, value, key)


def _convert_mapping(kind: Any, value: Value, key: str, origins: dict[str, str]) -> dict[str, Any]:
    if not isinstance(value.data, dict):
        raise _wrong(value, key, "a mapping of keys to values")
    if kind is Any:
        return value.plain()
    return {name: convert(kind, child, join(key, name), origins) for name, child in value.data.items()}


def _convert_scalar(kind: type, bounds: Bounds | None, value: Value, key: str) -> Any:
    data = value.data
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    allowed = f"{names[kind]}, {bounds}" if bounds is not None else names[kind]
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data)
    if kind is int and isinstance(data, float) and data.is_integer():
        data = int(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        hint = " (put it in quotes)" if kind is str and not isinstance(data, dict | list | NONE) else ""
        raise _wrong(value, key, allowed, hint)
    if bounds is not None and not bounds.allows(typing.cast(float, data)):
        raise _wrong(value, key, allowed)
    return data


def _items(value: Value, key: str) -> list[Value]:
    if not isinstance(value.data, list):
        raise _wrong(value, key, "a list")
    return value.data


def _wrong(value: Value, key: str, allowed: str, hint: str = "") -> UserError:
    data = value.plain()
    shown = "null" if data is None else str(data).lower() if isinstance(data, bool) else repr(data)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return UserError(f"{value.where}: {key or 'recipe'} is {shown}, but must be {allowed}{hint}")

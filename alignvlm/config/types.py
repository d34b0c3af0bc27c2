"""The types of the schema by dotted key: which keys a section has, and what a value must be, in words."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from alignvlm.connectors.options import AlignOptions, ConnectorOptions, options_class
from alignvlm.settings import FILLED

NONE = type(None)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def field_types(section: Any) -> dict[str, Any]:
    """Keys that a recipe may state in a section -> their types, in the order of the schema."""
    return _field_types(section)


@functools.cache  # loading the quickstart took 54 ms of CPU without, 14 with it
def _field_types(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section) if FILLED not in f.metadata}


def child_type(kind: Any, key: str | int, value: Any) -> Any:
    """The type of an entry of a mapping, a list or a section.

    `Any` where the schema says nothing, None where it has no such key. `value` (plain) is what `kind` describes: a
    connector's kind decides its options.
    """
    kind = section_of(kind, value)
    if dataclasses.is_dataclass(kind):
        return field_types(kind).get(str(key))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return arguments[1]
    if origin is list:
        return arguments[0]
    if origin is tuple and isinstance(key, int):
        return arguments[key]
    return Any if kind is Any else None


def section_of(kind: Any, value: Any = None) -> Any:
    """A type without `| None` and annotations, the first of several; a connector's is the options class of its kind."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (Union, types.UnionType):
        kind = next(section_of(option) for option in typing.get_args(kind) if option is not NONE)
    if kind is ConnectorOptions:
        name = value.get("kind") if isinstance(value, dict) else None
        return AlignOptions if name is None else options_class(str(name))
    return kind


def choices(kind: Any) -> list[str]:
    """The values of a type that lists them; [] for any other."""
    kind = section_of(kind)
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def describe(kind: Any) -> str:
    """What a value of this type must be: "a whole number, at least 1"."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(kind) if option is not NONE)
    limits: list[str] = []
    if typing.get_origin(kind) is Annotated:
        kind, *marks = typing.get_args(kind)
        over: list[Any] = [mark.gt for mark in marks if isinstance(mark, Gt)]
        limits += [f"at least {mark.ge:,}" for mark in marks if isinstance(mark, Ge) and mark.ge not in over]
        limits += [f"more than {bound:,}" for bound in over]
        limits += [f"less than {mark.lt:,}" for mark in marks if isinstance(mark, Lt)]
        most: list[Any] = [mark.le for mark in marks if isinstance(mark, Le)]
        limits += [f"at most {min(most):,}"] if most else []
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(arguments) if len(arguments) == 1 else f"one of {', '.join(choices(kind))}"
    if origin is list:
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)} values"
    word = WORDS.get(kind, "a mapping of keys to values")
    return f"{word}, {' and '.join(limits)}" if limits else word

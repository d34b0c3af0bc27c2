"""From a tree of YAML values to a recipe. pydantic checks the types; errors name place, key, value and what is allowed.

No files here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from alignvlm.config.schema import Recipe
from alignvlm.config.tree import Value, join
from alignvlm.config.types import child_type, choices, describe, field_types, section_of
from alignvlm.connectors.options import OWN_KIND, ConnectorOptions, UnknownKindError, connector_kinds, options_class
from alignvlm.errors import UserError, shown
from data_pipeline.errors import did_you_mean, nearest

CONNECTOR = ("model", "connector")
LARGEST_FLOAT = 3.4e38
"""About the largest float32: models, losses and learning rates have at most 32 bits."""
LARGEST_INT = 2**63 - 1


def build(tree: Value) -> Recipe:
    """The recipe that a tree states, its sections not named yet (names.py).

    Raises:
        UserError: an unknown key, or a value that its key does not take.
    """
    connector = _at(tree, CONNECTOR)
    options = None if connector is None else _options_class(connector)
    _check_keys(Recipe, tree, "")
    plain = tree.plain()
    if connector is not None and options is not None:
        plain["model"]["connector"] = _validated(options, connector, CONNECTOR)
    return _validated(Recipe, tree, (), plain)


def origins(tree: Value, key: str = "") -> dict[str, str]:
    """Dotted key -> the place where it was written."""
    places = {key: tree.where}
    for name, child in _children(tree):
        places |= origins(child, join(key, name))
    return places


def check_scalars(tree: Value, key: str = "") -> None:
    """Raise UserError for numbers and text that no machine holds, also where the schema takes any value."""
    for name, child in _children(tree):
        check_scalars(child, join(key, name))
    value = tree.data
    if isinstance(value, float) and not math.isfinite(value):
        wanted = "finite"
    elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        wanted = f"a number of 32 bits, at most {LARGEST_FLOAT:g}"
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        wanted = f"a number of 64 bits, at most {LARGEST_INT:,}"
    elif isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        wanted = "text without NUL and without halves of surrogate pairs"
    else:
        return
    raise UserError(f"{tree.where}: {key} is {shown(value)}, but must be {wanted}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _options_class(connector: Value) -> type[ConnectorOptions]:
    kind = connector.data.get("kind") if isinstance(connector.data, dict) else None
    name = "align" if kind is None else kind.plain()
    try:
        return options_class(str(name))
    except UnknownKindError as error:
        where = connector.where if kind is None else kind.where
        hint = nearest(str(name), connector_kinds())
        raise UserError(f"{where}: model.connector.kind is {shown(name)}: {hint}. {OWN_KIND}") from error


@functools.cache
def _adapter(section: type) -> TypeAdapter[Any]:
    return TypeAdapter(section)


def _validated(section: type, tree: Value, path: tuple[str, ...], plain: Any = None) -> Any:
    try:
        return _adapter(section).validate_python(tree.plain() if plain is None else plain)
    except ValidationError as error:
        location = error.errors(include_url=False)[0]["loc"]
        _raise_wrong(section, tree, location, ".".join(path))


def _raise_wrong(section: type, tree: Value, location: tuple[int | str, ...], key: str) -> NoReturn:
    """The value at `location` inside a section is wrong: say what it must be."""
    kind: Any = section
    for step in location:
        child = dict(_children(tree)).get(step)
        if child is None:  # a list that is too short is wrong itself; pydantic also names the types of a union here
            continue
        kind = child_type(kind, step, tree.plain())
        key = join(key, step)
        tree = child
    data = tree.plain()
    allowed = describe(kind)
    hint = ""
    if allowed == "text" and not isinstance(data, dict | list | None):
        hint = " (put it in quotes)"
    if near := did_you_mean(shown(data).strip("'"), choices(kind)):
        hint = f"; {near}"
    raise UserError(f"{tree.where}: {key or 'recipe'} is {shown(data)}, but must be {allowed}{hint}")


def _check_keys(kind: Any, tree: Value, key: str) -> None:
    """Raise for the first key, in the order of the file, that its section does not have."""
    section = section_of(kind, tree.plain())
    known = field_types(section) if dataclasses.is_dataclass(section) and isinstance(tree.data, dict) else None
    for name, child in _children(tree):
        if known is not None and name not in known:
            raise UserError(f"{child.where}: unknown key {join(key, name)!r}: {_hint(section, name, known)}")
        below = child_type(section, name, None)
        if below is not None and below is not Any:
            _check_keys(below, child, join(key, name))


def _hint(section: Any, name: str, known: dict[str, Any]) -> str:
    """Nearest known keys; for a connector's option, the kind that has it."""
    if issubclass(section, ConnectorOptions):
        kinds = [kind for kind in connector_kinds() if name in field_types(options_class(kind))]
        if kinds:
            return f"it is an option of {' and '.join(kinds)}, not of {section().kind}"
    return nearest(name, known)


def _children(tree: Value) -> Iterator[tuple[Any, Value]]:
    if isinstance(tree.data, dict):
        yield from tree.data.items()
    elif isinstance(tree.data, list):
        yield from enumerate(tree.data)


def _at(tree: Value, path: tuple[str, ...]) -> Value | None:
    for key in path:
        if not isinstance(tree.data, dict) or key not in tree.data:
            return None
        tree = tree.data[key]
    return tree

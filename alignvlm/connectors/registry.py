"""Kinds of connectors by name. `@register` adds one, from this package or from any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from alignvlm.connectors.base import Connector, ConnectorOptions, Sizes

C = TypeVar("C", bound=type[Connector])
_CLASSES: dict[str, type[Connector]] = {}


def register(connector: C) -> C:
    """Class decorator: the connector may be named in recipes, by the default of its options' `kind`.

    Raises:
        ValueError: the kind has no name, or belongs to another class.
    """
    kind = connector.options_class().kind
    if not kind or _CLASSES.get(kind, connector).__qualname__ != connector.__qualname__:
        raise ValueError(f"{connector.__qualname__}: the connector kind {kind!r} has no name or is taken")
    _CLASSES[kind] = connector
    return connector


def connector_kinds() -> list[str]:
    """Names of all kinds, in the order of their registration."""
    return list(_CLASSES)


def connector_class(kind: str) -> type[Connector]:
    """The class of a kind. Raises ValueError naming the kinds that there are."""
    if kind not in _CLASSES:
        raise ValueError(
            f"connector kind {kind!r} is unknown; known: {', '.join(_CLASSES)}. A kind of your own is known once its "
            "module is imported: name it in the recipe's `imports`, or in ALIGNVLM_IMPORTS"
        )
    return _CLASSES[kind]


def connector_options(saved: Mapping[str, Any]) -> ConnectorOptions:
    """Options from the config of an export; options of other kinds, which older exports hold too, are left out."""
    options_class = connector_class(str(saved.get("kind", "align"))).options_class
    names = {field.name for field in fields(options_class)}
    return options_class(**{name: value for name, value in saved.items() if name in names})


def build_connector(options: ConnectorOptions, sizes: Sizes) -> Connector:
    """A connector with new parameters."""
    return connector_class(options.kind)(options, sizes)

"""Classes of connectors by kind. `@register` adds one, from this package or from any other."""

from __future__ import annotations

import importlib
from typing import TypeVar

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import ConnectorOptions, options_class, register_options

C = TypeVar("C", bound=type[Connector])
_CLASSES: dict[str, type[Connector]] = {}


def register(connector: C) -> C:
    """Class decorator: recipes may name the connector, by the default of its options' `kind`.

    Raises:
        ValueError: the kind has no name, or belongs to another class.
    """
    register_options(connector.options_class)
    _CLASSES[connector.options_class().kind] = connector
    return connector


def connector_class(kind: str) -> type[Connector]:
    """The class of a kind. Raises ValueError naming the kinds that there are."""
    options_class(kind)
    if kind not in _CLASSES:
        importlib.import_module(f"{__package__}.{kind}")
    return _CLASSES[kind]


def build_connector(options: ConnectorOptions, sizes: Sizes) -> Connector:
    """A connector with new parameters."""
    return connector_class(options.kind)(options, sizes)

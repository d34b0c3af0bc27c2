"""Connectors between vision encoder and LLM: one file per kind, behind one interface (base.py) and a registry.

The names below, which code outside of this folder needs, are imported on first use: options are known without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignvlm.connectors.align import AlignConnector
    from alignvlm.connectors.base import Connector, Sizes
    from alignvlm.connectors.options import (
        AlignOptions,
        ConnectorOptions,
        connector_kinds,
        connector_options,
        options_class,
    )
    from alignvlm.connectors.registry import build_connector, connector_class, register

__all__ = [
    "AlignConnector",
    "AlignOptions",
    "Connector",
    "ConnectorOptions",
    "Sizes",
    "build_connector",
    "connector_class",
    "connector_kinds",
    "connector_options",
    "options_class",
    "register",
]

_HOMES = {
    "AlignConnector": "align",
    "AlignOptions": "options",
    "Connector": "base",
    "ConnectorOptions": "options",
    "Sizes": "base",
    "build_connector": "registry",
    "connector_class": "registry",
    "connector_kinds": "options",
    "connector_options": "options",
    "options_class": "options",
    "register": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Connectors between vision encoder and LLM: one file per kind, behind one interface (base.py) and a registry."""

from __future__ import annotations

from alignvlm.connectors.align import AlignConnector, AlignOptions
from alignvlm.connectors.base import Connector, ConnectorOptions, Sizes
from alignvlm.connectors.mlp import MLPConnector, MLPOptions
from alignvlm.connectors.ovis import OvisConnector, OvisOptions
from alignvlm.connectors.perceiver import PerceiverConnector, PerceiverOptions
from alignvlm.connectors.registry import (
    build_connector,
    connector_class,
    connector_kinds,
    connector_options,
    register,
)

__all__ = [
    "AlignConnector",
    "AlignOptions",
    "Connector",
    "ConnectorOptions",
    "MLPConnector",
    "MLPOptions",
    "OvisConnector",
    "OvisOptions",
    "PerceiverConnector",
    "PerceiverOptions",
    "Sizes",
    "build_connector",
    "connector_class",
    "connector_kinds",
    "connector_options",
    "register",
]

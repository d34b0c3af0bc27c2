"""Connectors between vision encoder and LLM, behind one interface (base.py)."""

from __future__ import annotations

from typing import Any

from alignvlm.connectors.align import AlignConnector
from alignvlm.connectors.base import Connector
from alignvlm.connectors.mlp import MLPConnector
from alignvlm.connectors.ovis import OvisConnector
from alignvlm.connectors.perceiver import PerceiverConnector

__all__ = ["AlignConnector", "Connector", "MLPConnector", "OvisConnector", "PerceiverConnector", "build_connector"]


def build_connector(options: dict[str, Any], vision_size: int, hidden_size: int, vocab_size: int) -> Connector:
    """The connector that `options` (the fields of `ConnectorConfig`) describe.

    Args:
        options: `kind` and the options of that kind; those of other kinds are ignored.
        vision_size: d, width of a visual feature after token merging.
        hidden_size: D, width of the LLM.
        vocab_size: V, rows of the LLM's input embedding.
    """

    def chosen(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    kind = options.get("kind")
    if kind == "align":
        own = chosen("gain", "temperature", "norm_hidden", "norm_vocab", "num_active")
        return AlignConnector(vision_size, hidden_size, vocab_size, **own)
    inner = options.get("hidden_size")
    if kind == "mlp":
        return MLPConnector(vision_size, hidden_size, inner_size=inner)
    if kind == "perceiver":
        resampler = chosen("num_latents", "num_layers", "num_heads")
        return PerceiverConnector(vision_size, hidden_size, inner_size=inner, **resampler)
    if kind == "ovis":
        return OvisConnector(vision_size, hidden_size, **chosen("visual_vocab_size"))
    raise ValueError(f"connector.kind = {kind!r} is unknown; known: align, mlp, ovis, perceiver")

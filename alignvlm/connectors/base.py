"""The one interface of all connectors: visual features in, LLM input embeddings out."""

from __future__ import annotations

import torch
from torch import nn


class Connector(nn.Module):
    """Maps the features of tiles to the LLM's input space.

    `forward(features, embedding)` takes features [K, T, d] of K tiles and the LLM's input embedding weight [V, D] (an
    argument and not a submodule, so that ZeRO-3 and shared gradients work), and returns [K, T', D]. A model calls it
    exactly once per forward pass.
    """

    collect_statistics: bool = False
    """When set, the next forward pass leaves numbers worth tracking in `last_statistics`."""
    last_statistics: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.last_statistics = {}

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise the parameters that belong to this module itself."""

    def copy_lm_head(self, weight: torch.Tensor) -> None:
        """Take over what the connector shares with the LM head at the start (ALIGN's W2); others need nothing."""

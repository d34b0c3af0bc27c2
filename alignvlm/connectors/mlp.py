"""The two-layer MLP connector of LLaVA-1.5, the paper's main baseline."""

from __future__ import annotations

import torch
from torch import nn

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import MLPOptions
from alignvlm.connectors.registry import register


@register
class MLPConnector(Connector):
    """`W_b gelu(W_a f)`: features [K, T, d] to [K, T, D]."""

    options_class = MLPOptions

    def __init__(self, options: MLPOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        inner = options.hidden_size or sizes.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(sizes.feature_size, inner), nn.GELU(), nn.Linear(inner, sizes.hidden_size)
        )

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.layers(features)

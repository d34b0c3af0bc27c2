"""The two-layer MLP connector of LLaVA-1.5, the paper's main baseline."""

from __future__ import annotations

import torch
from torch import nn

from alignvlm.connectors.base import Connector


class MLPConnector(Connector):
    """`W_b gelu(W_a f)`: features [K, T, d] to [K, T, D]."""

    def __init__(self, vision_size: int, hidden_size: int, *, inner_size: int | None = None) -> None:
        super().__init__()
        inner_size = inner_size or hidden_size
        self.layers = nn.Sequential(nn.Linear(vision_size, inner_size), nn.GELU(), nn.Linear(inner_size, hidden_size))

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.layers(features)

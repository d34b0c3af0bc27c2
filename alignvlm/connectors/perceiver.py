"""The Perceiver resampler (Flamingo), a baseline of the paper: learned queries read each tile."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import ConnectorOptions, PerceiverOptions
from alignvlm.connectors.registry import register


@register
class PerceiverConnector(Connector):
    """`num_latents` queries cross-attend to the features of a tile: [K, T, d] to [K, num_latents, D]."""

    options_class = PerceiverOptions

    def __init__(self, options: PerceiverOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        inner = options.hidden_size or sizes.hidden_size
        if inner % options.num_heads:
            raise ValueError(f"connector.num_heads = {options.num_heads} does not divide the width {inner}")
        self.latents = nn.Parameter(torch.empty(options.num_latents, inner))
        self.project_in = nn.Linear(sizes.feature_size, inner)
        self.layers = nn.ModuleList(PerceiverLayer(inner, options.num_heads) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(inner)
        self.project_out = nn.Linear(inner, sizes.hidden_size)
        self.reset_parameters()

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, PerceiverOptions)
        return options.num_latents

    def reset_parameters(self) -> None:
        nn.init.normal_(self.latents, std=0.02)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        context = self.project_in(features)  # [K, T, I]
        latents = self.latents.expand(len(features), -1, -1)  # [K, L, I]
        for layer in self.layers:
            latents = layer(latents, context)
        return self.project_out(self.norm(latents))


class PerceiverLayer(nn.Module):
    """Pre-norm cross-attention (keys and values: context and latents, as in Flamingo) and a feed-forward block."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_latents = nn.LayerNorm(size)
        self.norm_context = nn.LayerNorm(size)
        self.to_query = nn.Linear(size, size, bias=False)
        self.to_key_value = nn.Linear(size, 2 * size, bias=False)
        self.to_out = nn.Linear(size, size, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)
        )

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        queries = self.norm_latents(latents)
        keys, values = self.to_key_value(torch.cat([self.norm_context(context), queries], dim=1)).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_query(queries), keys, values)]
        read = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        latents = latents + self.to_out(read)
        return latents + self.feed_forward(latents)

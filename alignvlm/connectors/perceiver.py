"""The Perceiver resampler, a baseline of the paper, in the form of Flamingo and LLaVA-NeXT: queries read each tile."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import ConnectorOptions, PerceiverOptions
from alignvlm.connectors.registry import register


@register
class PerceiverConnector(Connector):
    """`num_latents` queries cross-attend to the features of a tile: [K, T, d] to [K, num_latents, D].

    The queries have the width of the features (or `hidden_size`, to which these are projected first); LLaVA's two-layer
    MLP takes what they have read to the LLM's width.
    """

    options_class = PerceiverOptions
    older_exports = "those of earlier versions held other layers: load them with the version that wrote them"

    def __init__(self, options: PerceiverOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        width = options.hidden_size or sizes.feature_size
        self.project_in = nn.Linear(sizes.feature_size, width) if width != sizes.feature_size else nn.Identity()
        self.latents = nn.Parameter(torch.empty(options.num_latents, width))
        self.layers = nn.ModuleList(
            PerceiverLayer(width, options.num_heads, options.head_dim) for _ in range(options.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Sequential(
            nn.Linear(width, sizes.hidden_size), nn.GELU(), nn.Linear(sizes.hidden_size, sizes.hidden_size)
        )
        self.reset_parameters()

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, PerceiverOptions)
        return options.num_latents

    def reset_parameters(self) -> None:
        nn.init.normal_(self.latents)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        context = self.project_in(features)  # [K, T, I]
        latents = self.latents.expand(len(features), -1, -1)  # [K, L, I]
        for layer in self.layers:
            latents = layer(latents, context)
        return self.project_out(self.norm(latents))


class PerceiverLayer(nn.Module):
    """Pre-norm cross-attention (keys and values: context and latents, as in Flamingo) and a feed-forward block."""

    def __init__(self, size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.norm_latents = nn.LayerNorm(size)
        self.norm_context = nn.LayerNorm(size)
        self.to_query = nn.Linear(size, inner, bias=False)
        self.to_key_value = nn.Linear(size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, size, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 4 * size, bias=False), nn.GELU(), nn.Linear(4 * size, size, bias=False)
        )

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        queries = self.norm_latents(latents)
        keys, values = self.to_key_value(torch.cat([self.norm_context(context), queries], dim=1)).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_query(queries), keys, values)]
        read = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        latents = latents + self.to_out(read)
        return latents + self.feed_forward(latents)

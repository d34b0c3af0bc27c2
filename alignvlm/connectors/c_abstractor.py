"""The C-Abstractor of Honeybee (arXiv 2312.06742), a baseline of the paper: convolutions, pooling, convolutions."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import CAbstractorOptions, ConnectorOptions
from alignvlm.connectors.registry import register

EPS = 1e-5
"""Epsilon of all LayerNorms. timm's LayerNorm has 1e-6, but its norm with an activation, Honeybee's, has 1e-5."""
STD = 0.02
"""Standard deviation of new weights and position embeddings."""


@register
class CAbstractorConnector(Connector):
    """`depth` RegNet blocks, average pooling to q x q, `depth` more, and an MLP: [K, T, d] to [K, q^2, D].

    Learned position embeddings are added to the features first. Channels come last everywhere.
    """

    options_class = CAbstractorOptions

    def __init__(self, options: CAbstractorOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        width = options.hidden_size if options.depth else sizes.feature_size
        self.positions = nn.Embedding(sizes.side**2, sizes.feature_size)
        self.before = nn.Sequential(*_blocks(options.depth, sizes.feature_size, width))
        self.after = nn.Sequential(*_blocks(options.depth, width, width))
        self.readout = nn.Sequential(nn.Linear(width, sizes.hidden_size))
        for _ in range(options.mlp_depth - 1):
            self.readout.extend([nn.SiLU(), nn.Linear(sizes.hidden_size, sizes.hidden_size)])

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, CAbstractorOptions)
        number = options.num_queries
        if math.isqrt(number) ** 2 != number:
            raise ValueError(f"connector.num_queries = {number} is not a square number, such as 144 or 196")
        return number

    def reset_layer(self, layer: nn.Module) -> bool:
        if isinstance(layer, nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=STD)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        else:
            return super().reset_layer(layer)
        return True

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        side, queries = self.sizes.side, math.isqrt(self.tokens_per_tile(self.options, self.sizes.side))
        x = features + self.positions(torch.arange(side**2, device=features.device))
        x = self.before(x.unflatten(1, (side, side)))  # [K, s, s, C]
        x = self.after(adaptive_mean(adaptive_mean(x, 1, queries), 2, queries))  # [K, q, q, C]
        return self.readout(x.flatten(1, 2))


def adaptive_mean(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Mean over `size` windows along a dimension of n: window i reaches from floor(i n / size) to ceil((i+1) n / size).

    Along two dimensions it is PyTorch's adaptive average pooling, whose backward pass on a GPU has no fixed order.
    """
    length, windows = x.shape[dim], torch.arange(size, device=x.device)[:, None]
    places = torch.arange(length, device=x.device)
    first, end = windows * length // size, ((windows + 1) * length + size - 1) // size
    inside = ((places >= first) & (places < end)).to(x.dtype)  # [size, n]
    counts = inside.sum(dim=1).view(-1, *[1] * (x.dim() - 1))
    return (torch.tensordot(inside, x, dims=([1], [dim])) / counts).movedim(0, dim)


class Bottleneck(nn.Module):
    """A RegNet block as timm builds it with its defaults and SiLU: [K, s, s, C_in] to [K, s, s, C_out].

    1 x 1, depthwise 3 x 3, squeeze-and-excitation and 1 x 1 beside a shortcut, a LayerNorm over the channels after each
    convolution. The squeezed width follows from C_in.
    """

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        squeezed = round(0.25 * size_in)
        self.enter = nn.Linear(size_in, size, bias=False)
        self.norm_enter = nn.LayerNorm(size, eps=EPS)
        self.depthwise = nn.Conv2d(size, size, 3, padding=1, groups=size, bias=False)
        self.norm_depthwise = nn.LayerNorm(size, eps=EPS)
        self.excite = nn.Sequential(nn.Linear(size, squeezed), nn.SiLU(), nn.Linear(squeezed, size), nn.Sigmoid())
        self.leave = nn.Linear(size, size, bias=False)
        self.norm_leave = nn.LayerNorm(size, eps=EPS)
        self.shortcut = nn.Sequential()
        if size_in != size:
            self.shortcut.extend([nn.Linear(size_in, size, bias=False), nn.LayerNorm(size, eps=EPS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm_enter(self.enter(x)))
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # over [K, C, s, s]
        y = F.silu(self.norm_depthwise(y))
        y = y * self.excite(y.mean(dim=(1, 2), keepdim=True))
        return F.silu(self.norm_leave(self.leave(y)) + self.shortcut(x))


def _blocks(depth: int, size_in: int, size: int) -> list[Bottleneck]:
    return [Bottleneck(size if number else size_in, size) for number in range(depth)]

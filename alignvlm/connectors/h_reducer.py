"""The H-Reducer of DocOwl 1.5 (arXiv 2403.12895), a baseline of the paper: rows of patches become visual tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import ConnectorOptions, HReducerOptions
from alignvlm.connectors.registry import register
from alignvlm.connectors.windows import join_windows, num_windows


@register
class HReducerConnector(Connector):
    """`W_f W_2 gelu(W_1 u)` of every window's features u: [K, T, d] to [K, windows + 1, D], the last token learned.

    DocOwl has two convolutions, 1 x 4 with stride 4, and between them gives each window's 4 d channels to its four
    places. A window then sees itself alone, and both are matrix products: `W_1[:, j d : (j+1) d]` is the first
    convolution's kernel at column j, and so is W_2's.
    """

    options_class = HReducerOptions

    def __init__(self, options: HReducerOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        rows, columns = options.window
        self.window = (rows, columns)
        joined = rows * columns * sizes.feature_size
        self.expand = nn.Linear(joined, joined)
        self.reduce = nn.Linear(joined, sizes.feature_size)
        self.project = nn.Linear(sizes.feature_size, sizes.hidden_size)
        self.eos = nn.Parameter(torch.empty(sizes.hidden_size)) if options.eos else None
        self.reset_parameters()

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, HReducerOptions)
        rows, columns = options.window
        return num_windows(side, rows) * num_windows(side, columns) + options.eos

    def reset_parameters(self) -> None:
        if self.eos is not None:
            nn.init.normal_(self.eos)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        windows = join_windows(features, self.window)  # [K, n, rows * columns * d]
        tokens = self.project(self.reduce(F.gelu(self.expand(windows))))
        return tokens if self.eos is None else torch.cat([tokens, self.eos.expand(len(tokens), 1, -1)], dim=1)

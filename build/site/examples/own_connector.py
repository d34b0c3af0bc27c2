"""A connector of your own in one file: average pooling over windows of features, then a linear layer.

A recipe imports the file and names the kind:

    imports: [examples/own_connector.py]
    model:
      connector: {kind: pooling, window: 2}

Everything else works as with the connectors of the package: `alignvlm estimate`, `train`, `eval`. An export names its
connector, but not this file: set ALIGNVLM_IMPORTS=examples/own_connector.py for commands and programs that load it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from alignvlm.connectors import Connector, ConnectorOptions, Sizes, register
from alignvlm.settings import Bool, PositiveInt, settings


@settings
class PoolingOptions(ConnectorOptions):
    """Options of the pooling connector."""

    kind: Literal["pooling"] = "pooling"
    """Mean of each window of features, and a linear layer."""
    window: PositiveInt = 2
    """Side of a window: window x window features become one visual token."""
    bias: Bool = True
    """Whether the linear layer has a bias."""


@register
class PoolingConnector(Connector):
    """`W mean(window)`: features [K, side x side, d] to [K, (side / window)^2, D]."""

    options_class = PoolingOptions

    def __init__(self, options: PoolingOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.window = options.window
        self.linear = nn.Linear(sizes.feature_size, sizes.hidden_size, bias=options.bias)

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, PoolingOptions)
        if side % options.window:
            raise ValueError(
                f"connector.window = {options.window} does not divide the {side} features of a tile's side"
            )
        return (side // options.window) ** 2

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        side, window = self.sizes.side, self.window
        windows = features.unflatten(1, (side // window, window, side // window, window))  # [K, r, w, c, w, d]
        return self.linear(windows.mean(dim=(2, 4)).flatten(1, 2))

"""The Ovis connector, a baseline of the paper: a softmax over learned visual words, and a table of its own."""

from __future__ import annotations

import torch
from torch import nn

from alignvlm.connectors.base import Connector
from alignvlm.kernels import vocab_softmax


class OvisConnector(Connector):
    """`softmax(f W^T) E_visual`: features [K, T, d] to [K, T, D], over `visual_vocab_size` words (arXiv 2405.20797).

    ALIGN differs in that its table is the LLM's own and that its logits pass a LayerNorm.
    """

    def __init__(self, vision_size: int, hidden_size: int, *, visual_vocab_size: int = 8192) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.empty(visual_vocab_size, vision_size))
        self.table = nn.Parameter(torch.empty(visual_vocab_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.head, std=0.02)
        nn.init.normal_(self.table, std=0.02)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        words = vocab_softmax(features.flatten(0, -2), self.head, self.table, normalize=False)  # [N, D]
        return words.view(*features.shape[:-1], -1)

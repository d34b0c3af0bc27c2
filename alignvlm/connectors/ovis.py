"""The Ovis connector, a baseline of the paper: a softmax over learned visual words with their own table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import OvisOptions
from alignvlm.connectors.registry import register
from alignvlm.kernels import vocab_softmax
from alignvlm.kernels.align import kept_logits_bytes, recomputed_flops, workspace_bytes


@register
class OvisConnector(Connector):
    """`softmax(f W^T) E_visual`: features [K, T, d] to [K, T, D], over `visual_vocab_size` words (arXiv 2405.20797).

    ALIGN differs in that its table is the LLM's own and that its logits pass a LayerNorm.
    """

    options_class = OvisOptions

    def __init__(self, options: OvisOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.head = nn.Parameter(torch.empty(options.visual_vocab_size, sizes.feature_size))
        self.table = nn.Parameter(torch.empty(options.visual_vocab_size, sizes.hidden_size))
        self.reset_parameters()

    def recomputed_flops(self, num_tokens: int) -> float:
        return recomputed_flops(num_tokens, self.head)

    def workspace_bytes(self, num_tokens: int) -> float:
        return workspace_bytes(num_tokens, self.head)

    def kept_logits_bytes(self, num_tokens: int, budget: float) -> float:
        return kept_logits_bytes(num_tokens, self.head, budget)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.head, std=0.02)
        nn.init.normal_(self.table, std=0.02)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"normalize": False, "kept_bytes": self.kept_bytes}
        words = vocab_softmax(features.flatten(0, -2), self.head, self.table, **options)  # [N, D]
        return words.view(*features.shape[:-1], -1)

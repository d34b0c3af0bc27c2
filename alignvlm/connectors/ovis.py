"""The Ovis connector, a baseline of the paper: a softmax over learned visual words with their own table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from alignvlm.connectors.base import Sizes
from alignvlm.connectors.options import ConnectorOptions, OvisOptions
from alignvlm.connectors.registry import register
from alignvlm.connectors.vocabulary import VocabularyConnector, drawn_like


@register
class OvisConnector(VocabularyConnector):
    """`softmax(LN(f W^T)) E_visual`: features [K, T, d] to [K, T, D], over `visual_vocab_size` learned words.

    Ovis (arXiv 2405.20797); the LayerNorm over the words (affine, eps 1e-5) stands in the published code of all its
    versions. ALIGN differs in W1 and the LayerNorm before the logits, in the table, which is the LLM's own, and in the
    start of W2.
    """

    options_class = OvisOptions
    older_exports = 'one written before the connector had a LayerNorm loads with "norm_vocab": false there'

    def __init__(self, options: OvisOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        num_words, self.norm_vocab = options.visual_vocab_size, options.norm_vocab
        self.text_start = options.table_start == "text"
        self.head = nn.Parameter(torch.empty(num_words, sizes.feature_size))
        self.gamma = nn.Parameter(torch.empty(num_words)) if self.norm_vocab else None
        self.beta = nn.Parameter(torch.empty(num_words)) if self.norm_vocab else None
        self.table = nn.Parameter(torch.empty(num_words, sizes.hidden_size))
        self.indicators = nn.Parameter(torch.empty(2, sizes.hidden_size)) if options.indicators else None
        self.reset_parameters()

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        assert isinstance(options, OvisOptions)
        return side**2 + (2 if options.indicators else 0)

    @property
    def logit_rows(self) -> Tensor:
        return self.head

    def reset_parameters(self) -> None:
        """Initialise the weights as Ovis' `nn.Linear` and `nn.Embedding` are."""
        nn.init.kaiming_uniform_(self.head, a=math.sqrt(5))
        nn.init.normal_(self.table)
        if self.gamma is not None and self.beta is not None:
            nn.init.ones_(self.gamma)
            nn.init.zeros_(self.beta)
        if self.indicators is not None:
            nn.init.normal_(self.indicators)

    @torch.no_grad()
    def start_from(self, embedding: Tensor, lm_head: Tensor) -> None:
        """The table starts with the mean and the spread of the text embeddings, unless `table_start` says otherwise."""
        if not self.text_start:
            return
        for weight in (self.table, self.indicators):
            if weight is not None:
                weight.copy_(drawn_like(embedding, len(weight)))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        words = self._average(features.flatten(0, -2), self.table, self.gamma, self.beta)  # [K T, D]
        words = words.view(*features.shape[:-1], -1)
        if self.indicators is None:
            return words
        first, last = self.indicators.expand(len(words), -1, -1).split(1, dim=1)  # [K, 1, D] each
        return torch.cat([first, words, last], dim=1)

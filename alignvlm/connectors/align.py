"""The ALIGN connector (AlignVLM, arXiv 2502.01341, section 3): a visual token is a weighted average of text embeddings.

The mathematics lives in `alignvlm.kernels`; here are only the parameters, their initialisation and the statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignvlm.connectors.base import Connector
from alignvlm.kernels import vocab_softmax
from alignvlm.kernels.reference import vocab_probabilities

STATISTICS_ROWS = 64


class AlignConnector(Connector):
    """softmax(LN_V(W2 LN_D(W1 f))) E: features [..., d] -> [..., D]; E is the LLM's input embedding [V, D].

    `w2`, `gamma` and `beta` are parameters of this module itself: ZeRO-3 gathers a module's own parameters before its
    forward, while those of a submodule whose forward is bypassed would stay empty. E is an argument for that reason too.
    """

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        vocab_size: int,
        *,
        gain: float = 1.0,
        temperature: float = 1.0,
        norm_hidden: bool = True,
        norm_vocab: bool = True,
        eps: float = 1e-5,
    ) -> None:
        """`gain` is the initial gamma of the LayerNorm over V; `temperature` divides the logits after it."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.vocab_size, self.gain, self.temperature, self.eps = vocab_size, gain, temperature, eps
        self.norm_vocab = norm_vocab
        self.w1 = nn.Linear(vision_size, hidden_size)
        self.ln_hidden = nn.LayerNorm(hidden_size, eps=eps) if norm_hidden else nn.Identity()
        self.w2 = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.gamma = nn.Parameter(torch.empty(vocab_size)) if norm_vocab else None
        self.beta = nn.Parameter(torch.empty(vocab_size)) if norm_vocab else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh W2 (as an LM head would be; the model then copies the real one), gamma and beta.

        Only this module's own parameters: under ZeRO-3 its submodules are already partitioned when it is constructed.
        """
        nn.init.normal_(self.w2, std=0.02)
        if self.gamma is not None and self.beta is not None:
            nn.init.constant_(self.gamma, self.gain)
            nn.init.zeros_(self.beta)

    @torch.no_grad()
    def copy_lm_head(self, weight: Tensor) -> None:
        """Start W2 as a copy of the LM head [V, D], as the paper does."""
        if weight.shape != self.w2.shape:
            raise ValueError(f"weight of the LM head is {tuple(weight.shape)} but W2 is {tuple(self.w2.shape)}")
        self.w2.copy_(weight)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Features [..., d] and E [V, D] -> visual tokens [..., D] inside the convex hull of E's rows."""
        if embedding.shape != self.w2.shape:
            raise ValueError(
                f"embedding is {tuple(embedding.shape)} but the connector was built for {tuple(self.w2.shape)}"
            )
        h = self.ln_hidden(self.w1(features)).reshape(-1, self.w2.shape[1])  # [N, D]
        gamma, beta = self.gamma, self.beta
        if self.temperature != 1.0:
            if gamma is not None and beta is not None:
                gamma, beta = gamma / self.temperature, beta / self.temperature
            else:
                h = h / self.temperature
        if self.collect_statistics:
            self.collect_statistics = False
            self.last_statistics = self._statistics(h, gamma, beta)
        tokens = vocab_softmax(h, self.w2, embedding, gamma, beta, eps=self.eps, normalize=self.norm_vocab)
        return tokens.view(*features.shape[:-1], tokens.shape[-1])

    @torch.no_grad()
    def _statistics(self, h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> dict[str, float]:
        """Mean entropy (nats) and mean largest probability over at most 64 evenly spread rows."""
        if h.shape[0] == 0:
            return {}
        rows = torch.linspace(0, h.shape[0] - 1, min(STATISTICS_ROWS, h.shape[0]), device=h.device).long()
        h = h[rows].to(self.w2.dtype)
        p = vocab_probabilities(h, self.w2, gamma, beta, eps=self.eps, normalize=self.norm_vocab).float()
        entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=-1).mean()
        return {"entropy": float(entropy), "top_mass": float(p.amax(dim=-1).mean())}

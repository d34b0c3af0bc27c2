"""What connectors share that average over a vocabulary: ALIGN over the LLM's own, Ovis over one that it learns.

The mathematics lives in `alignvlm.kernels`; here are its costs, the moments of the weights and the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import ConnectorOptions
from alignvlm.kernels import Moments, SharedMoments, moments_pay_off, vocab_moments, vocab_softmax
from alignvlm.kernels.align import kept_logits_bytes, recomputed_flops, workspace_bytes
from alignvlm.kernels.matmul import wide_dtype

EPS = 1e-5
"""Epsilon of all LayerNorms here."""
STATISTICS_ROWS = 64


class VocabularyConnector(Connector):
    """softmax(gamma LN_V(h W^T) + beta) E for rows W [V, d] that a subclass names as `logit_rows`.

    W, gamma and beta are parameters of the connector itself: ZeRO-3 gathers a module's own parameters before its
    forward, while those of a submodule whose forward is bypassed would stay empty.
    """

    norm_vocab: bool
    """Whether there is a LayerNorm over V; gamma and beta are None without it."""

    def __init__(self, options: ConnectorOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self._shared: SharedMoments | None = None
        self._inference_moments: Moments | None = None
        self._inference_tokens = 0

    @property
    def logit_rows(self) -> Tensor:
        """W [V, d]: one row per entry of the vocabulary."""
        raise NotImplementedError

    def recomputed_flops(self, num_tokens: int) -> float:
        return recomputed_flops(num_tokens, self.logit_rows)

    def workspace_bytes(self, num_tokens: int) -> float:
        return workspace_bytes(num_tokens, self.logit_rows)

    def kept_logits_bytes(self, num_tokens: int, budget: float) -> float:
        return kept_logits_bytes(num_tokens, self.logit_rows, budget)

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """Forward passes while this is open share the moments of W, which gradients pass through all the same."""
        self._shared = SharedMoments()
        try:
            yield
        finally:
            self._shared = None

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; moments kept for inference are forgotten, for the weights may have changed."""
        self._inference_moments, self._inference_tokens = None, 0
        super().train(mode)
        return self

    def _average(self, h: Tensor, table: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """The operator: h [N, d] and E [V, D] -> [N, D]. Leaves statistics behind when it was asked to."""
        moments = self._moments(h.shape[0])
        if self.collect_statistics:
            self.collect_statistics = False
            self.last_statistics = self._statistics(h, gamma, beta)
        options: dict[str, Any] = {"eps": EPS, "normalize": self.norm_vocab, "kept_bytes": self.kept_bytes}
        return vocab_softmax(h, self.logit_rows, table, gamma, beta, moments=moments, **options)

    def _fixed_moments(self) -> Moments | None:
        """Moments that are not those of W: of a vocabulary that W was cut from."""
        return None

    def _moments(self, num_tokens: int) -> Moments | SharedMoments | None:
        """Statistics of W that need not be computed again: fixed, shared, or in inference."""
        if not self.norm_vocab:
            return None
        if (fixed := self._fixed_moments()) is not None:
            return fixed
        if self._shared is not None or self.training or torch.is_grad_enabled():
            return self._shared
        self._inference_tokens += num_tokens
        if self._inference_moments is None and moments_pay_off(self._inference_tokens, self.logit_rows.shape[1]):
            self._inference_moments = vocab_moments(self.logit_rows)
        return self._inference_moments

    def _probabilities(self, h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """The weights of h [N, d]: [N, V] in fp32 (or float64). Holds all of it."""
        wide = wide_dtype(h.dtype)
        h = h.to(wide)
        logits = h @ self.logit_rows.to(wide).T  # [N, V]
        if gamma is not None and beta is not None:
            if (fixed := self._fixed_moments()) is None:
                variance, mean = torch.var_mean(logits, dim=-1, keepdim=True, correction=0)
            else:
                mean = (h @ fixed.mean.to(wide)).unsqueeze(1)
                variance = ((h @ fixed.covariance.to(wide)) * h).sum(dim=-1, keepdim=True)
            logits = (logits - mean) * torch.rsqrt(variance + EPS) * gamma + beta
        return torch.softmax(logits, dim=-1)

    @torch.no_grad()
    def _statistics(self, h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> dict[str, float]:
        """Mean entropy (nats) and mean largest probability over at most 64 evenly spread rows."""
        if h.shape[0] == 0:
            return {}
        rows = torch.linspace(0, h.shape[0] - 1, min(STATISTICS_ROWS, h.shape[0]), device=h.device).long()
        p = self._probabilities(h[rows], gamma, beta)
        entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=-1).mean()
        return {"entropy": float(entropy), "top_mass": float(p.amax(dim=-1).mean())}


def drawn_like(weight: Tensor, rows: int) -> Tensor:
    """New rows [rows, D] of a normal distribution with the mean and the standard deviation of all of weight [V, D]."""
    std, mean = torch.std_mean(weight.detach().to(wide_dtype(weight.dtype)))
    return nn.init.normal_(weight.new_empty(rows, weight.shape[1]), float(mean), float(std))

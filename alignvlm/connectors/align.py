"""The ALIGN connector (AlignVLM, arXiv 2502.01341, section 3): a visual token is a weighted average of text embeddings.

The mathematics lives in `alignvlm.kernels`; here are the parameters, their initialisation, the active vocabulary (a
declared part of the token ids) and the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignvlm.connectors.base import Connector, Sizes
from alignvlm.connectors.options import AlignOptions
from alignvlm.connectors.registry import register
from alignvlm.kernels import Moments, SharedMoments, moments_pay_off, vocab_moments, vocab_softmax
from alignvlm.kernels.align import kept_logits_bytes, recomputed_flops, workspace_bytes
from alignvlm.kernels.matmul import wide_dtype

EPS = 1e-5
"""Of both LayerNorms."""
STATISTICS_ROWS = 64


@register
class AlignConnector(Connector):
    """softmax(LN_V(W2 LN_D(W1 f))) E: features [..., d] -> [..., D]; E is the LLM's input embedding [V, D].

    `w2`, `gamma` and `beta` are parameters of this module itself: ZeRO-3 gathers a module's own parameters before its
    forward, while those of a submodule whose forward is bypassed would stay empty. That is why E is an argument.

    With an active vocabulary W2, gamma and beta hold the rows of `active_ids` only. The LayerNorm then keeps the mean
    and variance of the whole vocabulary (`vocab_mean`, `vocab_covariance`), so that the result is the full model's
    softmax restricted to these tokens; training moves the rows, not the statistics.
    """

    active_ids: Tensor
    """[V_active] token ids in the order of W2's rows (only with an active vocabulary)."""
    vocab_mean: Tensor
    vocab_covariance: Tensor

    options_class = AlignOptions

    def __init__(self, options: AlignOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        num_active, hidden_size = options.num_active, sizes.hidden_size
        if num_active is not None and num_active > sizes.vocab_size:
            raise ValueError(f"num_active must be in 1…{sizes.vocab_size}, not {num_active}")
        self.vocab_size, self.gain, self.temperature = sizes.vocab_size, options.gain, options.temperature
        self.eps, self.norm_vocab = EPS, options.norm_vocab
        num_rows = num_active or sizes.vocab_size
        self.w1 = nn.Linear(sizes.feature_size, hidden_size)
        self.ln_hidden = nn.LayerNorm(hidden_size, eps=self.eps) if options.norm_hidden else nn.Identity()
        self.w2 = nn.Parameter(torch.empty(num_rows, hidden_size))
        self.gamma = nn.Parameter(torch.empty(num_rows)) if self.norm_vocab else None
        self.beta = nn.Parameter(torch.empty(num_rows)) if self.norm_vocab else None
        if num_active is not None:
            self._register_active(torch.arange(num_active), torch.zeros(hidden_size), torch.eye(hidden_size))
        self._shared: SharedMoments | None = None
        self._inference_moments: Moments | None = None
        self._inference_tokens = 0
        self.reset_parameters()

    def recomputed_flops(self, num_tokens: int) -> float:
        return recomputed_flops(num_tokens, self.w2)

    def workspace_bytes(self, num_tokens: int) -> float:
        return workspace_bytes(num_tokens, self.w2)

    def kept_logits_bytes(self, num_tokens: int, budget: float) -> float:
        return kept_logits_bytes(num_tokens, self.w2, budget)

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """Forward passes while this is open share the moments of W2, which gradients pass through all the same."""
        self._shared = SharedMoments()
        try:
            yield
        finally:
            self._shared = None

    @property
    def is_restricted(self) -> bool:
        """Whether there is an active vocabulary."""
        return "active_ids" in self._buffers

    def _register_active(self, ids: Tensor, mean: Tensor, covariance: Tensor) -> None:
        self.register_buffer("active_ids", ids)
        if self.norm_vocab:
            self.register_buffer("vocab_mean", mean)
            self.register_buffer("vocab_covariance", covariance)

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
        expected = (self.vocab_size, self.w2.shape[1])
        if weight.shape != expected:
            raise ValueError(f"weight of the LM head is {tuple(weight.shape)} but the connector needs {expected}")
        if not self.is_restricted:
            self.w2.copy_(weight)
            return
        self.w2.copy_(weight[self.active_ids])
        if self.norm_vocab:
            moments = vocab_moments(weight)
            self.vocab_mean.copy_(moments.mean)
            self.vocab_covariance.copy_(moments.covariance)

    @torch.no_grad()
    def keep_tokens(self, ids: Tensor) -> None:
        """Restrict the vocabulary to these token ids [V_active], in this order.

        W2, gamma and beta are replaced by their rows: give an optimizer the new parameters.
        """
        if self.is_restricted:
            raise ValueError("ids: the vocabulary is restricted already; start from the full model")
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(f"ids must be a non-empty int64 [V_active], not {ids.dtype} {tuple(ids.shape)}")
        if ids.unique().numel() != ids.numel() or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids must be distinct token ids below {self.vocab_size}")
        moments = vocab_moments(self.w2)
        self._register_active(ids.to(self.w2.device), moments.mean, moments.covariance)
        for name in ("w2", "gamma", "beta"):
            parameter = getattr(self, name)
            if parameter is not None:
                rows = parameter[self.active_ids].clone()
                setattr(self, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))

    def train(self, mode: bool = True) -> AlignConnector:
        """Switch the mode; moments kept for inference are forgotten, for the weights may have changed."""
        self._inference_moments, self._inference_tokens = None, 0
        super().train(mode)
        return self

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Features [..., d] and E [V, D] -> visual tokens [..., D] inside the convex hull of E's rows."""
        expected = (self.vocab_size, self.w2.shape[1])
        if embedding.shape != expected:
            raise ValueError(f"embedding is {tuple(embedding.shape)} but the connector was built for {expected}")
        h, gamma, beta = self._inputs(features)
        moments = self._moments(h.shape[0])
        if self.collect_statistics:
            self.collect_statistics = False
            self.last_statistics = self._statistics(h)
        rows = embedding[self.active_ids] if self.is_restricted else embedding
        options: dict[str, Any] = {"eps": self.eps, "normalize": self.norm_vocab, "kept_bytes": self.kept_bytes}
        tokens = vocab_softmax(h, self.w2, rows, gamma, beta, moments=moments, **options)
        return tokens.view(*features.shape[:-1], tokens.shape[-1])

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """P_vocab of features [N, d]: [N, V_active] in fp32 (or float64).

        Columns are token ids, or the order of `active_ids`. Holds all of it: for statistics and pictures of few rows.
        """
        return self._probabilities(self._inputs(features)[0])

    def _inputs(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """h [N, D], and gamma and beta with the temperature applied."""
        h = self.ln_hidden(self.w1(features)).reshape(-1, self.w2.shape[1])
        gamma, beta = self.gamma, self.beta
        if self.temperature == 1.0:
            return h, gamma, beta
        if gamma is None or beta is None:
            return h / self.temperature, gamma, beta
        return h, gamma / self.temperature, beta / self.temperature

    def _moments(self, num_tokens: int) -> Moments | SharedMoments | None:
        """Statistics of the vocabulary that need not be computed again: restricted, shared, or in inference."""
        if not self.norm_vocab:
            return None
        if self.is_restricted:
            wide = wide_dtype(self.w2.dtype)
            return Moments(self.vocab_mean.to(wide), self.vocab_covariance.to(wide), constant=True)
        if self._shared is not None or self.training or torch.is_grad_enabled():
            return self._shared
        self._inference_tokens += num_tokens
        if self._inference_moments is None and moments_pay_off(self._inference_tokens, self.w2.shape[1]):
            self._inference_moments = vocab_moments(self.w2)
        return self._inference_moments

    def _probabilities(self, h: Tensor) -> Tensor:
        wide = wide_dtype(h.dtype)
        h = h.to(wide)
        logits = h @ self.w2.to(wide).T  # [N, V_active]
        if self.norm_vocab and self.gamma is not None and self.beta is not None:
            if not self.is_restricted:
                variance, mean = torch.var_mean(logits, dim=-1, keepdim=True, correction=0)
            else:
                mean = (h @ self.vocab_mean.to(wide)).unsqueeze(1)
                variance = ((h @ self.vocab_covariance.to(wide)) * h).sum(dim=-1, keepdim=True)
            logits = (logits - mean) * torch.rsqrt(variance + self.eps)
            logits = (logits * self.gamma + self.beta) / self.temperature
        return torch.softmax(logits, dim=-1)

    @torch.no_grad()
    def _statistics(self, h: Tensor) -> dict[str, float]:
        """Mean entropy (nats) and mean largest probability over at most 64 evenly spread rows."""
        if h.shape[0] == 0:
            return {}
        rows = torch.linspace(0, h.shape[0] - 1, min(STATISTICS_ROWS, h.shape[0]), device=h.device).long()
        p = self._probabilities(h[rows])
        entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=-1).mean()
        return {"entropy": float(entropy), "top_mass": float(p.amax(dim=-1).mean())}

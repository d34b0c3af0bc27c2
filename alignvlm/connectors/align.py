"""The ALIGN connector (AlignVLM, arXiv 2502.01341, section 3): a visual token is a weighted average of text embeddings.

Here are the parameters, their start, and the active vocabulary (a declared part of the token ids); vocabulary.py has
what it shares with Ovis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alignvlm.connectors.base import Sizes
from alignvlm.connectors.options import AlignOptions
from alignvlm.connectors.registry import register
from alignvlm.connectors.vocabulary import EPS, VocabularyConnector, drawn_like
from alignvlm.kernels import Moments, vocab_moments
from alignvlm.kernels.matmul import wide_dtype


@register
class AlignConnector(VocabularyConnector):
    """softmax(LN_V(W2 LN_D(W1 f))) E: features [..., d] -> [..., D]; E is the LLM's input embedding [V, D].

    That is the paper's form. The form of the released low-resource code has a ReLU after LN_D (`activation`) and a
    LayerNorm of the average (`norm_output`).

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
        self.norm_vocab, self.random_start = options.norm_vocab, options.w2_start == "random"
        num_rows = num_active or sizes.vocab_size
        self.w1 = nn.Linear(sizes.feature_size, hidden_size)
        self.ln_hidden = nn.LayerNorm(hidden_size, eps=EPS) if options.norm_hidden else nn.Identity()
        self.activation = nn.ReLU() if options.activation == "relu" else nn.Identity()
        self.ln_output = nn.LayerNorm(hidden_size, eps=EPS) if options.norm_output else nn.Identity()
        self.w2 = nn.Parameter(torch.empty(num_rows, hidden_size))
        self.gamma = nn.Parameter(torch.empty(num_rows)) if self.norm_vocab else None
        self.beta = nn.Parameter(torch.empty(num_rows)) if self.norm_vocab else None
        if num_active is not None:
            self._register_active(torch.arange(num_active), torch.zeros(hidden_size), torch.eye(hidden_size))
        self.reset_parameters()

    @property
    def logit_rows(self) -> Tensor:
        return self.w2

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

    def reset_layer(self, layer: nn.Module) -> bool:
        return False  # W1 starts as the layers of the LLM do

    @torch.no_grad()
    def start_from(self, embedding: Tensor, lm_head: Tensor) -> None:
        """W2 starts as a copy of the LM head, as in the paper, or with random rows of the same mean and spread."""
        expected = (self.vocab_size, self.w2.shape[1])
        if lm_head.shape != expected:
            raise ValueError(f"weight of the LM head is {tuple(lm_head.shape)} but the connector needs {expected}")
        weight = drawn_like(lm_head, len(lm_head)) if self.random_start else lm_head
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

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Features [..., d] and E [V, D] -> visual tokens [..., D], averages of E's rows (normed by `norm_output`)."""
        expected = (self.vocab_size, self.w2.shape[1])
        if embedding.shape != expected:
            raise ValueError(f"embedding is {tuple(embedding.shape)} but the connector was built for {expected}")
        rows = embedding[self.active_ids] if self.is_restricted else embedding
        h, gamma, beta = self._inputs(features)
        tokens = self.ln_output(self._average(h, rows, gamma, beta))
        return tokens.view(*features.shape[:-1], tokens.shape[-1])

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """P_vocab of features [N, d]: [N, V_active] in fp32 (or float64).

        Columns are token ids, or the order of `active_ids`. Holds all of it: for statistics and pictures of few rows.
        """
        return self._probabilities(*self._inputs(features))

    def _inputs(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """h [N, D], and gamma and beta with the temperature applied."""
        h = self.activation(self.ln_hidden(self.w1(features))).reshape(-1, self.w2.shape[1])
        gamma, beta = self.gamma, self.beta
        if self.temperature == 1.0:
            return h, gamma, beta
        if gamma is None or beta is None:
            return h / self.temperature, gamma, beta
        return h, gamma / self.temperature, beta / self.temperature

    def _fixed_moments(self) -> Moments | None:
        if not (self.is_restricted and self.norm_vocab):
            return None
        wide = wide_dtype(self.w2.dtype)
        return Moments(self.vocab_mean.to(wide), self.vocab_covariance.to(wide), constant=True)

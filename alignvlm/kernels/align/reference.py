"""The ALIGN operator in the obvious lines of PyTorch: what every other implementation is tested against.

It keeps several N x V tensors for its backward; use it for small problems and in tests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear


def vocab_probabilities(
    h: Tensor,
    w2: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """softmax(gamma * LN_V(h W2^T) + beta): [N, D] -> [N, V], in the dtype of `h` (float64 works)."""
    logits = linear(h, w2)  # [N, V]
    gamma, beta = (None if part is None else part.to(logits.dtype) for part in (gamma, beta))
    if normalize:
        return torch.softmax(layer_norm(logits, logits.shape[-1:], gamma, beta, eps), dim=-1)
    if gamma is not None:
        logits = logits * gamma
    if beta is not None:
        logits = logits + beta
    return torch.softmax(logits, dim=-1)


def vocab_softmax_reference(
    h: Tensor,
    w2: Tensor,
    e: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """The whole operator: [N, D] -> [N, D_e]. Shapes as in `vocab_softmax`."""
    p = vocab_probabilities(h, w2, gamma, beta, eps=eps, normalize=normalize)
    return p.to(e.dtype) @ e

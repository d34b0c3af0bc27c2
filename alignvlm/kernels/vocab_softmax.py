"""The public face of the ALIGN operator: checks arguments, applies autocast, and chooses an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from alignvlm.kernels.reference import vocab_softmax_reference


def vocab_softmax(
    h: Tensor,
    w2: Tensor,
    e: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    w2_bias: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """softmax(gamma * LN_V(h W2^T + b) + beta) E: [N, D] -> [N, D_e]."""
    device_type = h.device.type
    if torch.is_autocast_enabled(device_type) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        h, w2, e = h.to(dtype), w2.to(dtype), e.to(dtype)
        w2_bias = w2_bias if w2_bias is None else w2_bias.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return vocab_softmax_reference(h, w2, e, gamma, beta, w2_bias=w2_bias, eps=eps, normalize=normalize).to(h.dtype)

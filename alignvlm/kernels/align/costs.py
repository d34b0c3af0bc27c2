"""What the operator costs, before it runs: products and saved tensors on the meta device, recomputation, workspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvlm.kernels.align.vocab_blocks import default_block, num_kept
from alignvlm.kernels.matmul import wide_dtype


class VocabSoftmaxOnMeta(torch.autograd.Function):
    """The products of the plain form, and the saved tensors of the implementations that hold no N x V."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w2: Tensor, e: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        p = h @ w2.T  # [N, V]
        out = p @ e
        ctx.save_for_backward(h, w2, e, gamma, beta, out, h.new_empty(len(h), dtype=wide_dtype(h.dtype)))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Logits computed again are not counted: `recomputed_flops` states them."""
        h, w2, e, gamma, beta, *_ = ctx.saved_tensors
        needs_h, needs_w2, needs_e, needs_gamma, needs_beta = ctx.needs_input_grad
        p = h.new_empty(len(h), len(w2))
        grad_logits = grad_out @ e.T if needs_h or needs_w2 or needs_gamma or needs_beta else p
        return (
            grad_logits @ w2 if needs_h else None,
            grad_logits.T @ h if needs_w2 else None,
            p.T @ grad_out if needs_e else None,
            torch.empty_like(gamma) if needs_gamma else None,
            torch.empty_like(beta) if needs_beta else None,
        )


def recomputed_flops(num_tokens: int, w2: Tensor) -> float:
    """FLOPs of the logits that a backward pass computes again: one product of h [N, D] with W2 [V, D]."""
    return 2.0 * num_tokens * w2.numel()


def workspace_bytes(num_tokens: int, w2: Tensor) -> float:
    """Bytes that a backward pass on a GPU holds for a moment: four blocks [N, block], fp32 sums [N, D] and [D, D]."""
    width = w2.shape[1]
    block = default_block(num_tokens, len(w2), w2.dtype, torch.device("cuda"))
    return 4.0 * num_tokens * block * w2.dtype.itemsize + 8.0 * num_tokens * width + 8.0 * width**2


def kept_logits_bytes(num_tokens: int, w2: Tensor, budget: float) -> float:
    """Bytes of logits, in whole blocks, that a forward pass on a GPU keeps for its backward pass within a budget."""
    block = default_block(num_tokens, len(w2), w2.dtype, torch.device("cuda"))
    row = num_tokens * w2.dtype.itemsize
    return float(row * min(len(w2), block * num_kept(num_tokens, len(w2), block, w2.dtype, budget)))

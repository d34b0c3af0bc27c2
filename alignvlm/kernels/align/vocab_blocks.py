"""The ALIGN operator as one sweep over blocks of the vocabulary, forward and backward in closed form.

At no time is there more than N x block of anything; there are no atomics, so two runs agree bit for bit. The
element-wise part is left to row kernels (rows_torch.py, rows_triton.py), matrix products to matmul.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvlm.kernels.align.common import NeedsGrad, Settings, VocabAffine, blocks_of, matrix_in
from alignvlm.kernels.align.moments import (
    add_hidden_gradient,
    add_weight_gradient,
    logit_statistics,
    moments_pay_off,
    swept_statistics,
    vocab_moments,
)
from alignvlm.kernels.align.rows_torch import TorchRows
from alignvlm.kernels.matmul import accumulate, product_into, wide_dtype

if TYPE_CHECKING:
    from alignvlm.kernels.align.rows_triton import TritonRows

    RowKernels = TorchRows | TritonRows

_CPU_BLOCK_BYTES = 4 << 20
_CUDA_BLOCK = 8192


def default_block(num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Vocabulary rows per block: what stays in a CPU's cache, or what keeps a GPU's matrix products efficient."""
    if device.type == "cuda":
        block = _CUDA_BLOCK if num_tokens > _CUDA_BLOCK else 2 * _CUDA_BLOCK
    else:
        fitting = _CPU_BLOCK_BYTES // (max(num_tokens, 1) * wide_dtype(dtype).itemsize)
        block = min(max(1 << max(fitting.bit_length() - 1, 0), 512), 8192)
    return min(block, vocab_size)


class VocabBlocks(torch.autograd.Function):
    """softmax(gamma * LN_V(h W2^T) + beta) E; weights are arguments, as ZeRO-3 needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w2: Tensor,
        e: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: Settings,
        row_kernels: type[RowKernels],
    ) -> Tensor:
        statistics = None
        if settings.normalize:
            if settings.moments is None and (settings.needs_grad or moments_pay_off(*h.shape)):
                settings = replace(settings, moments=vocab_moments(w2))
            if settings.moments is not None:
                statistics = logit_statistics(h, settings.moments, settings.eps)
            else:
                statistics = swept_statistics(h, w2, settings.eps)
        block = settings.block or default_block(h.shape[0], w2.shape[0], h.dtype, h.device)
        out, lse = _sweep_forward(row_kernels(h, statistics), w2, e, _affine(h, gamma, beta), block)
        ctx.save_for_backward(h, w2, e, gamma, beta, out, lse)
        ctx.row_kernels, ctx.statistics, ctx.moments, ctx.block = row_kernels, statistics, settings.moments, block
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return (*_sweep_backward(ctx, grad_out.contiguous()), None, None)


def _affine(h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> VocabAffine:
    wide = wide_dtype(h.dtype)
    return VocabAffine(*(None if part is None else part.to(wide) for part in (gamma, beta)))


def _sweep_forward(
    kernels: RowKernels, w2: Tensor, e: Tensor, affine: VocabAffine, block_size: int
) -> tuple[Tensor, Tensor]:
    """(output [N, D_e], log of the normaliser [N])."""
    num_tokens, vocab_size = kernels.left.shape[0], w2.shape[0]
    wide = wide_dtype(kernels.left.dtype)
    acc = kernels.left.new_zeros(num_tokens, e.shape[1], dtype=wide)
    peak = kernels.left.new_full((num_tokens,), -torch.inf, dtype=wide)
    total = torch.zeros_like(peak)
    buffer = kernels.left.new_empty(num_tokens * min(block_size, vocab_size))
    for block in blocks_of(vocab_size, block_size) if num_tokens else ():
        z = matrix_in(buffer, num_tokens, block.stop - block.start)
        product_into(z, kernels.left, kernels.operand(w2[block]).T)
        p, mass, factor = kernels.forward(z, affine.block(block), peak)
        total.mul_(factor).add_(mass)
        kernels.rescale(acc, factor)
        accumulate(acc, p, kernels.operand(e[block]))
    out = acc.div_(total.unsqueeze(1)).to(e.dtype)
    return out, peak.add_(total.log_())


def _sweep_backward(ctx: Any, grad_out: Tensor) -> list[Tensor | None]:
    """Gradients of h, w2, e, gamma, beta; None and no work where none is needed."""
    h, w2, e, gamma, beta, out, lse = ctx.saved_tensors
    needs = NeedsGrad(*ctx.needs_input_grad[:5])
    wide = wide_dtype(h.dtype)
    fresh = torch.empty_like if h.shape[0] else torch.zeros_like  # the sweep writes every row
    grad_w2 = fresh(w2, memory_format=torch.contiguous_format) if needs.w2 else None
    grad_e = fresh(e, memory_format=torch.contiguous_format) if needs.e else None
    grad_gamma = torch.zeros_like(gamma) if needs.gamma else None
    grad_beta = torch.zeros_like(beta) if needs.beta else None
    acc = torch.zeros_like(h, dtype=wide) if needs.h else None  # [N, D]
    g_sum, g_zhat_sum = (h.new_zeros(h.shape[0], dtype=wide) for _ in range(2))

    def sweep() -> None:
        kernels = ctx.row_kernels(h, ctx.statistics)
        affine = _affine(h, gamma, beta)
        upstream = kernels.operand(grad_out)
        delta = (grad_out.to(wide) * out.to(wide)).sum(dim=1)
        size = h.shape[0] * min(ctx.block, w2.shape[0])
        buffers = [kernels.left.new_empty(size) for _ in range(kernels.num_buffers if needs.logits else 1)]
        for block in blocks_of(w2.shape[0], ctx.block):
            z, *scratch = (matrix_in(buffer, h.shape[0], block.stop - block.start) for buffer in buffers)
            w2_block, part = kernels.operand(w2[block]), affine.block(block)
            product_into(z, kernels.left, w2_block.T)
            if not needs.logits:
                if grad_e is not None:
                    product_into(grad_e[block], kernels.probabilities(z, part, lse).T, upstream)
                continue
            dp = scratch.pop()
            product_into(dp, upstream, kernels.operand(e[block]).T)
            p, g, sums = kernels.backward(z, dp, part, lse, delta, scratch, store_p=needs.e, affine_sums=needs.affine)
            if grad_e is not None:
                product_into(grad_e[block], p.T, upstream)
            if acc is not None:
                accumulate(acc, g, w2_block)
            if grad_w2 is not None:
                product_into(grad_w2[block], g.T, kernels.left)
            for grad, value in ((grad_gamma, sums.gamma), (grad_beta, sums.beta)):
                if grad is not None and value is not None:
                    grad[block] = value
            if sums.g is not None and sums.g_zhat is not None:
                g_sum.add_(sums.g)
                g_zhat_sum.add_(sums.g_zhat)
        if acc is not None:
            kernels.hidden_gradient(acc)

    if h.shape[0]:
        sweep()
        if ctx.statistics is not None and ctx.moments is not None:
            moments = ctx.moments
            grad_mu, grad_var = ctx.statistics.gradients(g_sum, g_zhat_sum)
            if acc is not None:
                add_hidden_gradient(acc, h, moments, grad_mu, grad_var)
            if grad_w2 is not None and not moments.constant:
                add_weight_gradient(grad_w2, h, w2, moments, grad_mu, grad_var)
    return [None if acc is None else acc.to(h.dtype), grad_w2, grad_e, grad_gamma, grad_beta]

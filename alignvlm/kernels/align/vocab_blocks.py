"""The ALIGN operator as one sweep over blocks of the vocabulary, forward and backward in closed form.

At no time is there more than N x block of anything; there are no atomics, so two runs agree bit for bit. The
element-wise part is left to row kernels (rows_torch.py, rows_triton.py), matrix products to matmul.py.
"""

from __future__ import annotations

import itertools
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
        statistics, moments = None, settings.moments
        if settings.normalize:
            if moments is None and (settings.needs_grad or moments_pay_off(*h.shape)):
                moments = vocab_moments(w2)
            if moments is not None:
                statistics = logit_statistics(h, moments, settings.eps)
            else:
                statistics = swept_statistics(h, w2, settings.eps)
        block = settings.block or default_block(h.shape[0], w2.shape[0], h.dtype, h.device)
        kernels = row_kernels(h, statistics)
        budget = settings.kept_bytes if settings.needs_grad else 0
        kept = _kept_logits(kernels.left, w2.shape[0], block, budget)
        out, lse = _sweep_forward(kernels, w2, e, _affine(h, gamma, beta), block, kept)
        ctx.save_for_backward(h, w2, e, gamma, beta, out, lse, *kept)
        ctx.row_kernels, ctx.statistics, ctx.moments, ctx.block = row_kernels, statistics, moments, block
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return (*_sweep_backward(ctx, grad_out.contiguous()), None, None)


def _affine(h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> VocabAffine:
    wide = wide_dtype(h.dtype)
    return VocabAffine(*(None if part is None else part.to(wide) for part in (gamma, beta)))


def num_kept(num_tokens: int, vocab_size: int, block: int, dtype: torch.dtype, budget: float) -> int:
    """Blocks whose logits a forward pass keeps for its backward pass: the first ones, as many as the budget holds."""
    sizes = [num_tokens * (rows.stop - rows.start) * dtype.itemsize for rows in blocks_of(vocab_size, block)]
    return sum(total <= budget for total in itertools.accumulate(sizes))


def _kept_logits(left: Tensor, vocab_size: int, block: int, budget: float) -> list[Tensor]:
    """Memory [N, B] for the logits of these blocks."""
    count = num_kept(len(left), vocab_size, block, left.dtype, budget)
    blocks = itertools.islice(blocks_of(vocab_size, block), count)
    return [left.new_empty(len(left), rows.stop - rows.start) for rows in blocks]


def _sweep_forward(
    kernels: RowKernels, w2: Tensor, e: Tensor, affine: VocabAffine, block_size: int, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(output [N, D_e], log of the normaliser [N]); `kept` takes the logits of the first blocks."""
    num_tokens, vocab_size = kernels.left.shape[0], w2.shape[0]
    wide = wide_dtype(kernels.left.dtype)
    acc = kernels.left.new_zeros(num_tokens, e.shape[1], dtype=wide)
    peak = kernels.left.new_full((num_tokens,), -torch.inf, dtype=wide)
    total = torch.zeros_like(peak)
    buffer = kernels.left.new_empty(num_tokens * min(block_size, vocab_size))
    for i, block in enumerate(blocks_of(vocab_size, block_size) if num_tokens else ()):
        p = matrix_in(buffer, num_tokens, block.stop - block.start)
        z = kept[i] if i < len(kept) else p
        product_into(z, kernels.left, kernels.operand(w2[block]).T)
        factor = kernels.forward(z, affine.block(block), peak, total, out=p)
        kernels.rescale(acc, factor)
        accumulate(acc, p, kernels.operand(e[block]))
    out = acc.div_(total.unsqueeze(1)).to(e.dtype)
    return out, peak.add_(total.log_())


def _sweep_backward(ctx: Any, grad_out: Tensor) -> list[Tensor | None]:
    """Gradients of h, w2, e, gamma, beta; None and no work where none is needed."""
    h, w2, e, gamma, beta, out, lse, *kept = ctx.saved_tensors
    statistics, moments = ctx.statistics, ctx.moments
    needs = NeedsGrad(*ctx.needs_input_grad[:5])
    wide = wide_dtype(h.dtype)
    fresh = torch.empty_like if h.shape[0] else torch.zeros_like  # the sweep writes every row
    grad_w2 = fresh(w2, memory_format=torch.contiguous_format) if needs.w2 else None
    grad_e = fresh(e, memory_format=torch.contiguous_format) if needs.e else None
    grad_gamma = torch.zeros_like(gamma) if needs.gamma else None
    grad_beta = torch.zeros_like(beta) if needs.beta else None
    through_norm = statistics is not None and (needs.h or (needs.w2 and not moments.constant))
    acc = torch.zeros_like(h, dtype=wide) if needs.h or through_norm else None  # [N, D], sum of g / std W2

    def sweep() -> Tensor | None:
        """The sums of g / std [N]; gradients are written on the way."""
        kernels = ctx.row_kernels(h, statistics)
        affine = _affine(h, gamma, beta)
        upstream = kernels.operand(grad_out)
        delta = (grad_out.to(wide) * out.to(wide)).sum(dim=1)
        block_size = min(ctx.block, w2.shape[0])
        token_parts = kernels.token_parts(block_size) if through_norm else None
        size = h.shape[0] * block_size
        memory = [kernels.left.new_empty(size) for _ in range(kernels.num_buffers + 1 if needs.logits else 1)]
        for i, block in enumerate(blocks_of(w2.shape[0], ctx.block)):
            first, *others = (matrix_in(buffer, h.shape[0], block.stop - block.start) for buffer in memory)
            w2_block, part = kernels.operand(w2[block]), affine.block(block)
            z = kept[i] if i < len(kept) else first
            if i >= len(kept):
                product_into(z, kernels.left, w2_block.T)
            if not needs.logits:
                if grad_e is not None:
                    product_into(grad_e[block], kernels.probabilities(z, part, lse, out=first).T, upstream)
                continue
            dp = others.pop()
            product_into(dp, upstream, kernels.operand(e[block]).T)
            p, g, sums = kernels.backward(
                z, dp, part, lse, delta, [first, *others],
                store_p=needs.e, token_parts=token_parts, affine_sums=needs.affine,
            )  # fmt: skip
            if grad_e is not None:
                product_into(grad_e[block], p.T, upstream)
            if acc is not None:
                accumulate(acc, g, w2_block)
            if grad_w2 is not None:
                product_into(grad_w2[block], g.T, kernels.left)
            for grad, value in ((grad_gamma, sums.gamma), (grad_beta, sums.beta)):
                if grad is not None and value is not None:
                    grad[block] = value
        if acc is not None:
            kernels.hidden_gradient(acc)
        return None if token_parts is None else token_parts.sum(dim=0)

    if h.shape[0]:
        g_sum = sweep()
        if g_sum is not None and acc is not None:
            gradients = statistics.gradients(g_sum, statistics.g_zhat_sum(h, acc, g_sum))
            if needs.h:
                add_hidden_gradient(acc, h, moments, *gradients)
            if grad_w2 is not None and not moments.constant:
                add_weight_gradient(grad_w2, h, w2, moments, *gradients)
    return [acc.to(h.dtype) if needs.h and acc is not None else None, grad_w2, grad_e, grad_gamma, grad_beta]

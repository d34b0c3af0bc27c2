"""The ALIGN operator as one sweep over blocks of the vocabulary, forward and backward in closed form.

At no time is there more than N x block of anything; there are no atomics, so two runs agree bit for bit. The
element-wise part is left to a row implementation (rows_torch.py, rows_triton.py), matrix products to matmul.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvlm.kernels.align.moments import (
    MOMENTS_FROM_ROWS,
    Moments,
    RowStatistics,
    add_hidden_gradient,
    add_weight_gradient,
    row_statistics,
    swept_row_statistics,
    vocab_moments,
)
from alignvlm.kernels.align.rows_torch import TorchRows
from alignvlm.kernels.align.vectors import Columns, Needs, blocks_of, matrix_in
from alignvlm.kernels.matmul import accumulate, product_into, wide_dtype

if TYPE_CHECKING:
    from alignvlm.kernels.align.rows_triton import TritonRows

_CPU_BLOCK_BYTES = 4 << 20
_CUDA_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Settings:
    """What does not need a gradient."""

    eps: float
    normalize: bool
    block: int
    """Vocabulary rows per block."""
    triton: bool
    moments: Moments | None
    needs_grad: bool
    """False in inference, where the statistics of a few rows are cheaper from their logits than from W2's moments."""


def default_block(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Vocabulary rows per block: what stays in a CPU's cache, or what keeps a GPU's matrix products efficient."""
    if device.type == "cuda":
        block = _CUDA_BLOCK_ROWS if num_rows > _CUDA_BLOCK_ROWS else 2 * _CUDA_BLOCK_ROWS
    else:
        fitting = _CPU_BLOCK_BYTES // (max(num_rows, 1) * wide_dtype(dtype).itemsize)
        block = min(max(1 << max(fitting.bit_length() - 1, 0), 512), 8192)
    return min(block, vocab_size)


class VocabSoftmax(torch.autograd.Function):
    """softmax(gamma * LN_V(h W2^T + b) + beta) E; weights are arguments, as ZeRO-3 needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w2: Tensor,
        e: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        statistics = None
        if settings.normalize:
            if settings.moments is None and (settings.needs_grad or h.shape[0] > MOMENTS_FROM_ROWS * h.shape[1]):
                settings = replace(settings, moments=vocab_moments(w2))
            if settings.moments is not None:
                statistics = row_statistics(h, settings.moments, settings.eps)
            else:
                statistics = swept_row_statistics(h, w2, settings.eps)
        out, lse = _sweep_forward(h, w2, e, _columns(h, gamma, beta), statistics, settings)
        ctx.save_for_backward(h, w2, e, gamma, beta, out, lse)
        ctx.statistics, ctx.settings = statistics, settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return (*_sweep_backward(ctx, grad_out.contiguous()), None)


def _columns(h: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Columns:
    wide = wide_dtype(h.dtype)
    return Columns(*(None if part is None else part.to(wide) for part in (gamma, beta)))


def _rows(h: Tensor, statistics: RowStatistics | None, settings: Settings) -> TorchRows | TritonRows:
    if not settings.triton:
        return TorchRows(h, statistics)
    from alignvlm.kernels.align.rows_triton import TritonRows

    return TritonRows(h, statistics)


def _sweep_forward(
    h: Tensor, w2: Tensor, e: Tensor, columns: Columns, statistics: RowStatistics | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(output [N, D_e], log of the normaliser [N])."""
    num_tokens, vocab_size = h.shape[0], w2.shape[0]
    wide = wide_dtype(h.dtype)
    rows = _rows(h, statistics, settings)
    acc = h.new_zeros(num_tokens, e.shape[1], dtype=wide)
    peak = h.new_full((num_tokens,), -torch.inf, dtype=wide)
    total = torch.zeros_like(peak)
    buffer = rows.left.new_empty(num_tokens * min(settings.block, vocab_size))
    for block in blocks_of(vocab_size, settings.block) if num_tokens else ():
        z = matrix_in(buffer, num_tokens, block.stop - block.start)
        product_into(z, rows.left, rows.operand(w2[block]).T)
        p, mass, factor = rows.forward(z, columns.block(block), peak)
        total.mul_(factor).add_(mass)
        rows.rescale(acc, factor)
        accumulate(acc, p, rows.operand(e[block]))
    out = acc.div_(total.unsqueeze(1)).to(e.dtype)
    return out, peak.add_(total.log_())


def _sweep_backward(ctx: Any, grad_out: Tensor) -> list[Tensor | None]:
    """Gradients of h, w2, e, gamma, beta; None and no work where none is needed."""
    h, w2, e, gamma, beta, out, lse = ctx.saved_tensors
    settings: Settings = ctx.settings
    needs = Needs(*ctx.needs_input_grad[:5])
    wide = wide_dtype(h.dtype)
    fresh = torch.empty_like if h.shape[0] else torch.zeros_like  # the sweep writes every row
    grad_w2 = fresh(w2, memory_format=torch.contiguous_format) if needs.w2 else None
    grad_e = fresh(e, memory_format=torch.contiguous_format) if needs.e else None
    grad_gamma = torch.zeros_like(gamma) if needs.gamma else None
    grad_beta = torch.zeros_like(beta) if needs.beta else None
    acc = torch.zeros_like(h, dtype=wide) if needs.h else None  # [N, D]
    row_sum, row_product = (h.new_zeros(h.shape[0], dtype=wide) for _ in range(2))

    def sweep() -> None:
        rows = _rows(h, ctx.statistics, settings)
        columns = _columns(h, gamma, beta)
        upstream = rows.operand(grad_out)
        delta = (grad_out.to(wide) * out.to(wide)).sum(dim=1)
        size = h.shape[0] * min(settings.block, w2.shape[0])
        buffers = [rows.left.new_empty(size) for _ in range(rows.num_buffers if needs.logits else 1)]
        for block in blocks_of(w2.shape[0], settings.block):
            z, *scratch = (matrix_in(buffer, h.shape[0], block.stop - block.start) for buffer in buffers)
            w2_block, part = rows.operand(w2[block]), columns.block(block)
            product_into(z, rows.left, w2_block.T)
            if not needs.logits:
                if grad_e is not None:
                    product_into(grad_e[block], rows.probabilities(z, part, lse).T, upstream)
                continue
            dp = scratch.pop()
            product_into(dp, upstream, rows.operand(e[block]).T)
            p, g, sums = rows.backward(z, dp, part, lse, delta, scratch, store_p=needs.e, column_sums=needs.columns)
            if grad_e is not None:
                product_into(grad_e[block], p.T, upstream)
            if acc is not None:
                accumulate(acc, g, w2_block)
            if grad_w2 is not None:
                product_into(grad_w2[block], g.T, rows.left)
            for grad, value in ((grad_gamma, sums.gamma), (grad_beta, sums.beta)):
                if grad is not None and value is not None:
                    grad[block] = value
            if sums.row is not None and sums.row_product is not None:
                row_sum.add_(sums.row)
                row_product.add_(sums.row_product)
        if acc is not None:
            rows.hidden_gradient(acc)

    if h.shape[0]:
        sweep()
        if ctx.statistics is not None and settings.moments is not None:
            moments = settings.moments
            grad_mu, grad_var = ctx.statistics.gradients(row_sum, row_product)
            if acc is not None:
                add_hidden_gradient(acc, h, moments, grad_mu, grad_var)
            if grad_w2 is not None and not moments.constant:
                add_weight_gradient(grad_w2, h, w2, moments, grad_mu, grad_var)
    return [None if acc is None else acc.to(h.dtype), grad_w2, grad_e, grad_gamma, grad_beta]

"""The ALIGN operator for a CPU: a chunk of tokens at a time against the whole vocabulary, in closed form both ways.

A chunk sees all logits of its tokens, so the LayerNorm's sums are known before the products that need them: W2's
covariance and the product that carries its gradient, which a sweep over the vocabulary needs, are not computed.

The backward holds two tensors [V, n] of a chunk, z and g. It begins with the chunk whose logits the forward has left
to it; g of that chunk lies where the gradient of W2 is going to be. The other chunks are half as large and share the
memory of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from alignvlm.kernels.align.chunks import ChunkSettings, Operands, backward_chunks_of, chunks_of
from alignvlm.kernels.align.moments import add_hidden_gradient
from alignvlm.kernels.align.vectors import LOWEST, Needs
from alignvlm.kernels.matmul import product_nt


class ChunkedVocabSoftmax(torch.autograd.Function):
    """softmax(gamma * LN_V(h W2^T) + beta) E for float32 and float64."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w2: Tensor,
        e: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: ChunkSettings,
    ) -> Tensor:
        operands = Operands(h, w2, e, gamma, beta, settings)
        out = h.new_empty(h.shape[0], e.shape[1])
        normaliser = h.new_empty(h.shape[0]), h.new_empty(h.shape[0])
        store = operands.store()
        for rows in chunks_of(h.shape[0]):
            result = _forward_chunk(operands, rows, operands.matrix(store, rows))
            out[rows], normaliser[0][rows], normaliser[1][rows] = result
        ctx.save_for_backward(h, w2, e, gamma, beta, out, *normaliser, store)
        ctx.settings, ctx.statistics, ctx.holds_logits = settings, operands.statistics, True
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        h, w2, e, gamma, beta, out, peak, total, store = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            operands = Operands(h, w2, e, gamma, beta, ctx.settings, ctx.statistics)
            needs = Needs(*ctx.needs_input_grad[:5])
            # Written into past autograd's eye: a second backward over the graph takes the memory, not the logits.
            backward = _Backward(operands, (peak, total), needs, store.data, ctx.holds_logits)
            ctx.holds_logits = False
            return (*backward.run(grad_out, torch.linalg.vecdot(grad_out, out)), None)


def _forward_chunk(operands: Operands, rows: slice, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output [n, D_e], largest logit [n], sum of exp(logit - largest) [n]); z [V, n] takes the normalised logits."""
    swept = operands.settings.sweeps_statistics
    blocks = _normalised(operands, rows, z) if swept else operands.logits(rows, z)
    peak, total = z.new_full(z.shape[1:], -torch.inf), z.new_zeros(z.shape[1])
    acc = z.new_zeros(operands.e.shape[1], z.shape[1])
    for block in blocks:
        p = operands.columns.block(block).affine(z[block], out=torch.empty_like(z[block]))
        new_peak = torch.maximum(peak, p.amax(dim=0).clamp_min_(LOWEST))
        factor, peak = torch.exp(peak - new_peak), new_peak
        p.sub_(peak).exp_()
        total.mul_(factor).add_(p.sum(dim=0))
        acc.mul_(factor).addmm_(operands.e[block].T, p)
        del p  # its memory, still in the cache, is the next one's
    return acc.div_(total).T, peak, total


def _normalised(operands: Operands, rows: slice, z: Tensor) -> Iterator[slice]:
    """Fill z [V, n] and the statistics of some tokens from their logits; yields each block once it is normalised."""
    statistics = operands.statistics
    assert statistics is not None, "sweeping them is asked for where there is a LayerNorm"
    squares = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for block in operands.logits(rows, z):  # their mean is taken off already
        squares += torch.linalg.vecdot(z[block], z[block], dim=0)
    statistics.rstd[rows] = torch.rsqrt(squares / z.shape[0] + operands.settings.eps)
    for block in operands.blocks(z.shape[1]):
        z[block] *= statistics.rstd[rows]
        yield block


class _Backward:
    """Gradients as sums over chunks; None, and no work, where nobody needs them."""

    def __init__(
        self, operands: Operands, normaliser: tuple[Tensor, Tensor], needs: Needs, store: Tensor, holds_logits: bool
    ) -> None:
        """`store` is the forward's; `holds_logits` says whether those of the last chunk are still in it."""
        self.operands, self.needs = operands, needs
        self.peak, self.total = normaliser
        self.store, self.holds_logits = store, holds_logits
        self.chunks = backward_chunks_of(operands.h.shape[0])
        moments = operands.settings.moments
        self.constant = moments if moments is not None and moments.constant else None
        """Moments through which h gets a gradient, but W2 does not."""
        self.first = True
        """The first chunk writes gradients, the others add to them."""
        columns, fresh = operands.columns, torch.empty_like if self.chunks else torch.zeros_like

        def matrix(like: Tensor, needed: bool) -> Tensor | None:
            return fresh(like, memory_format=torch.contiguous_format) if needed else None

        def column(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros_like(like) if needed and like is not None else None

        self.h, self.w2, self.e = (
            matrix(operands.h, needs.h),
            matrix(operands.w2, needs.w2),
            matrix(operands.e, needs.e),
        )
        self.gamma, self.beta = column(columns.gamma, needs.gamma), column(columns.beta, needs.beta)
        self.row_sum, self.row_product = (operands.h.new_zeros(operands.h.shape[0]) for _ in range(2))
        """[N] sums over V of g and of g zhat"""

    def run(self, upstream: Tensor, delta: Tensor) -> list[Tensor | None]:
        """Gradients of h, w2, e, gamma and beta.

        Args:
            upstream: [N, D_e] gradient of the output.
            delta: [N] product of output and its gradient.
        """
        operands = self.operands
        for rows in self.chunks:
            z = operands.matrix(self.store, rows)
            g = self._beside(z) if self.first else operands.matrix(self.store, rows, place=1)
            blocks = operands.blocks(z.shape[1]) if self.first and self.holds_logits else operands.logits(rows, z)
            # Divided by the sum of exponentials, so that exp(logit - peak) serves as p: the logarithm of that sum would
            # round p where logits are large.
            scaled = upstream[rows] / self.total[rows].unsqueeze(1), delta[rows] / self.total[rows]
            for block in blocks:
                self._through_softmax(rows, block, z[block], g[block], *scaled)
            if self.needs.logits:
                self._through_norm(rows, z, g)
            self.first = False
        if self.h is not None and self.constant is not None and operands.statistics is not None:
            through_statistics = operands.statistics.gradients(self.row_sum, self.row_product)
            add_hidden_gradient(self.h, operands.h, self.constant, *through_statistics)
        columns = (None if part is None else part.squeeze(1) for part in (self.gamma, self.beta))
        return [self.h, self.w2, self.e, *columns]

    def _beside(self, z: Tensor) -> Tensor:
        """[V, n] beside z where a whole chunk fills the store.

        The end of W2's gradient has room for it: its first k rows end before those of g that are still to be read.
        """
        if self.w2 is None or self.w2.shape[1] < z.shape[1]:
            return torch.empty_like(z)
        return self.w2.view(-1)[self.w2.numel() - z.numel() :].view_as(z)

    def _through_softmax(
        self, rows: slice, block: slice, zhat: Tensor, g: Tensor, upstream: Tensor, delta: Tensor
    ) -> None:
        """g [B, n] = gamma p (dp - delta) from normalised logits, and the sums that are made of p and g."""
        part = self.operands.columns.block(block)
        p = part.affine(zhat, out=torch.empty_like(zhat)).sub_(self.peak[rows]).exp_()
        self._add_product(self.e, block, p, upstream)
        if not self.needs.logits:
            return
        ds = product_nt(self.operands.e[block], upstream, -delta).mul_(p)
        _add_sum(self.beta, block, ds)
        if self.operands.settings.normalize or self.gamma is not None:
            product = torch.mul(ds, zhat, out=p)
            _add_sum(self.gamma, block, product)
            self.row_product[rows] += (product if part.gamma is None else product.mul_(part.gamma)).sum(dim=0)
        g = g.copy_(ds) if part.gamma is None else torch.mul(ds, part.gamma, out=g)
        if self.operands.settings.normalize:
            self.row_sum[rows] += g.sum(dim=0)

    def _through_norm(self, rows: slice, z: Tensor, g: Tensor) -> None:
        """From g [V, n] to the gradients of h and W2, through the LayerNorm over V."""
        operands = self.operands
        rstd = None if operands.statistics is None else operands.statistics.rstd[rows]
        left = operands.h[rows] if rstd is None else operands.h[rows] * rstd.unsqueeze(1)
        mean, mean_product = self.row_sum[rows] / z.shape[0], self.row_product[rows] / z.shape[0]
        acc = z.new_zeros(left.shape[1], left.shape[0])
        for block in operands.blocks(z.shape[1]):
            if operands.settings.normalize and self.constant is None:
                dz = torch.addcmul(g[block], z[block], mean_product, value=-1).sub_(mean)
            else:
                dz = g[block].clone()
            self._add_product(self.w2, block, dz, left)
            if self.h is not None:
                acc.addmm_(operands.w2[block].T, dz)
        if self.h is not None:
            self.h[rows] = acc.T if rstd is None else acc.T * rstd.unsqueeze(1)

    def _add_product(self, total: Tensor | None, block: slice, a: Tensor, b: Tensor) -> None:
        """`total[block] += a @ b`."""
        if total is None:
            return
        if self.first:
            torch.mm(a, b, out=total[block])
        else:
            total[block].addmm_(a, b)


def _add_sum(total: Tensor | None, block: slice, values: Tensor) -> None:
    """Add the sums over tokens of values [B, n] to total [V, 1]."""
    if total is not None:
        total[block] += values.sum(dim=1, keepdim=True)

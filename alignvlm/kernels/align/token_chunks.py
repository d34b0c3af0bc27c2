"""The ALIGN operator for a CPU: a chunk of tokens at a time against the whole vocabulary, in closed form both ways.

A chunk sees all logits of its tokens, so the LayerNorm's sums are known before the products that need them: W2's
covariance and the product that carries its gradient, which a sweep over the vocabulary needs, are not computed.

Logits lie transposed, [V, n]: a CPU multiplies many rows by few columns faster than the reverse.

The forward saves the logits of the last chunk, with which the backward begins; there its g fills a buffer of its own.
The other chunks have half as many tokens, so that their z and g fit into that buffer together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from alignvlm.kernels.align.common import LOWEST, NeedsGrad, Settings, VocabAffine, blocks_of, matrix_in
from alignvlm.kernels.align.moments import LogitStatistics, add_hidden_gradient, logit_statistics
from alignvlm.kernels.matmul import product_nt

CHUNK = 192
"""Tokens per chunk, whole register tiles of fp32 kernels (16, 48, 64). The last chunk has up to twice as many."""
_BLOCK_VALUES = 3 << 18
"""Logits per block: 3 MiB in fp32, which stay in the cache."""


def chunks_of(num_tokens: int) -> list[slice]:
    """The tokens in chunks: the last one of up to 2 CHUNK, the others of CHUNK, the first of what is left over."""
    last = max(num_tokens - 2 * CHUNK, 0)
    edges = sorted({0, *range(last, 0, -CHUNK), num_tokens})
    return [slice(start, stop) for start, stop in pairwise(edges)]


def block_size(num_tokens: int) -> int:
    """Vocabulary rows whose logits for this many tokens are worked on together."""
    return max(_BLOCK_VALUES // num_tokens, 1)


class TokenChunks(torch.autograd.Function):
    """softmax(gamma * LN_V(h W2^T) + beta) E for float32 and float64."""

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
        operands = _Operands(h, w2, e, gamma, beta, settings, _known_statistics(h, w2, settings))
        out = h.new_empty(h.shape[0], e.shape[1])
        peak, total = h.new_empty(h.shape[0]), h.new_empty(h.shape[0])
        buffer = operands.buffer()
        for tokens in chunks_of(h.shape[0]):
            z = matrix_in(buffer, w2.shape[0], tokens.stop - tokens.start)
            out[tokens], peak[tokens], total[tokens] = _forward_chunk(operands, tokens, z)
        ctx.save_for_backward(h, w2, e, gamma, beta, out, peak, total, buffer)
        ctx.settings, ctx.statistics = settings, operands.statistics
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        h, w2, e, gamma, beta, out, peak, total, last_logits = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            operands = _Operands(h, w2, e, gamma, beta, ctx.settings, ctx.statistics)
            gradients = _Gradients(operands, peak, total, NeedsGrad(*ctx.needs_input_grad[:5]))
            delta = torch.linalg.vecdot(grad_out, out)
            return (*gradients.run(grad_out, delta, last_logits), None)


def _known_statistics(h: Tensor, w2: Tensor, settings: Settings) -> LogitStatistics | None:
    """The LayerNorm's statistics before there are logits; 1/std is 1 where it is going to be taken from them."""
    if not settings.normalize:
        return None
    if settings.moments is not None:
        return logit_statistics(h, settings.moments, settings.eps)
    mu = h @ w2.mean(dim=0)
    return LogitStatistics(mu, torch.ones_like(mu))


class _Operands:
    """The operator's inputs, the LayerNorm's statistics, and the logits of some tokens."""

    def __init__(
        self,
        h: Tensor,
        w2: Tensor,
        e: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: Settings,
        statistics: LogitStatistics | None,
    ) -> None:
        self.h, self.w2, self.e, self.settings, self.statistics = h, w2, e, settings, statistics
        self.affine = VocabAffine(*(None if part is None else part.to(h.dtype).unsqueeze(1) for part in (gamma, beta)))

    def buffer(self) -> Tensor:
        """Memory for one matrix [V, n] of the last chunk, or for two of any other."""
        return self.h.new_empty(self.w2.shape[0] * min(self.h.shape[0], 2 * CHUNK))

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        """Blocks of the vocabulary for this many tokens."""
        return blocks_of(self.w2.shape[0], self.settings.block or block_size(num_tokens))

    def logits(self, tokens: slice, z: Tensor) -> Iterator[slice]:
        """Fill z [V, n] with the logits of some tokens, normalised by `statistics`; yields each block when filled.

        The same operations in the same order whether 1/std is known yet or not, so that a backward finds the forward's
        logits: a large logit off by its last bit would leave a softmax that does not sum to one.
        """
        h, statistics = self.h[tokens], self.statistics
        shift = None if statistics is None else -statistics.mu[tokens]
        for block in self.blocks(z.shape[1]):
            logits = product_nt(self.w2[block], h, shift)
            if statistics is None:
                z[block] = logits
            else:
                torch.mul(logits, statistics.rstd[tokens], out=z[block])
            del logits  # its memory, still in the cache, is the next one's
            yield block


def _forward_chunk(operands: _Operands, tokens: slice, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output [n, D_e], largest logit [n], sum of exp(logit - largest) [n]); z [V, n] takes the normalised logits."""
    swept = operands.settings.normalize and operands.settings.moments is None
    blocks = _normalised(operands, tokens, z) if swept else operands.logits(tokens, z)
    peak, total = z.new_full(z.shape[1:], -torch.inf), z.new_zeros(z.shape[1])
    acc = z.new_zeros(operands.e.shape[1], z.shape[1])
    for block in blocks:
        p = operands.affine.block(block).apply(z[block], out=torch.empty_like(z[block]))
        new_peak = torch.maximum(peak, p.amax(dim=0).clamp_min_(LOWEST))
        factor, peak = torch.exp(peak - new_peak), new_peak
        p.sub_(peak).exp_()
        total.mul_(factor).add_(p.sum(dim=0))
        acc.mul_(factor).addmm_(operands.e[block].T, p)
        del p  # its memory, still in the cache, is the next one's
    return acc.div_(total).T, peak, total


def _normalised(operands: _Operands, tokens: slice, z: Tensor) -> Iterator[slice]:
    """Fill z [V, n] and 1/std of some tokens from their logits; yields each block once it is normalised."""
    statistics = operands.statistics
    assert statistics is not None, "only a LayerNorm has statistics to sweep"
    squares = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for block in operands.logits(tokens, z):  # their mean is taken off already
        squares += torch.linalg.vecdot(z[block], z[block], dim=0)
    statistics.rstd[tokens] = torch.rsqrt(squares / z.shape[0] + operands.settings.eps)
    for block in operands.blocks(z.shape[1]):
        z[block] *= statistics.rstd[tokens]
        yield block


class _Gradients:
    """Gradients as sums over chunks; None, and no work, where nobody needs them."""

    def __init__(self, operands: _Operands, peak: Tensor, total: Tensor, needs: NeedsGrad) -> None:
        self.operands, self.peak, self.total, self.needs = operands, peak, total, needs
        moments = operands.settings.moments
        self.constant = moments if moments is not None and moments.constant else None
        """Moments through which h gets a gradient, but W2 does not."""
        self.keep = 0
        """Factor of what a matrix gradient holds already: 0 in the first chunk, which writes it, then 1."""
        # The chunks write every element of a matrix, where there are any.
        fresh = torch.empty_like if operands.h.shape[0] else torch.zeros_like
        affine = operands.affine

        def matrix(like: Tensor, needed: bool) -> Tensor | None:
            return fresh(like, memory_format=torch.contiguous_format) if needed else None

        def vector(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.zeros_like(like) if needed and like is not None else None

        self.h, self.w2 = matrix(operands.h, needs.h), matrix(operands.w2, needs.w2)
        self.e = matrix(operands.e, needs.e)
        self.gamma, self.beta = vector(affine.gamma, needs.gamma), vector(affine.beta, needs.beta)
        self.g_sum, self.g_zhat_sum = (operands.h.new_zeros(operands.h.shape[0]) for _ in range(2))
        """[N] sums over V of g and of g zhat"""

    def run(self, upstream: Tensor, delta: Tensor, last_logits: Tensor) -> list[Tensor | None]:
        """Gradients of h, w2, e, gamma and beta.

        Args:
            upstream: [N, D_e] gradient of the output.
            delta: [N] product of output and its gradient.
            last_logits: [V n] the normalised logits of the last chunk; they are only read.
        """
        operands, vocab_size = self.operands, self.operands.w2.shape[0]
        chunks = chunks_of(operands.h.shape[0])[::-1]
        buffer = operands.buffer()
        for tokens in chunks:
            num_tokens, is_last = tokens.stop - tokens.start, tokens is chunks[0]
            z = matrix_in(last_logits if is_last else buffer, vocab_size, num_tokens)
            g = matrix_in(buffer if is_last else buffer[z.numel() :], vocab_size, num_tokens)
            self.keep = 0 if is_last else 1
            # Divided by the sum of exponentials, so that exp(logit - peak) serves as p: the logarithm of that sum would
            # round p where logits are large.
            scaled = upstream[tokens] / self.total[tokens].unsqueeze(1), delta[tokens] / self.total[tokens]
            for block in operands.blocks(num_tokens) if is_last else operands.logits(tokens, z):
                self._through_softmax(tokens, block, z[block], g[block], *scaled)
            if self.needs.logits:
                self._through_norm(tokens, z, g)
        if self.h is not None and self.constant is not None and operands.statistics is not None:
            through_statistics = operands.statistics.gradients(operands.statistics.rstd * self.g_sum, self.g_zhat_sum)
            add_hidden_gradient(self.h, operands.h, self.constant, *through_statistics)
        vectors = (None if part is None else part.squeeze(1) for part in (self.gamma, self.beta))
        return [self.h, self.w2, self.e, *vectors]

    def _through_softmax(
        self, tokens: slice, block: slice, zhat: Tensor, g: Tensor, upstream: Tensor, delta: Tensor
    ) -> None:
        """Fill g [B, n] = gamma p (dp - delta) from normalised logits, and add up what is made of p and g."""
        affine = self.operands.affine.block(block)
        p = affine.apply(zhat, out=torch.empty_like(zhat)).sub_(self.peak[tokens]).exp_()
        self._add_product(self.e, block, p, upstream)
        if not self.needs.logits:
            return
        ds = product_nt(self.operands.e[block], upstream, -delta).mul_(p)
        _add_sum(self.beta, block, ds)
        if self.operands.settings.normalize or self.gamma is not None:
            product = torch.mul(ds, zhat, out=p)
            _add_sum(self.gamma, block, product)
            self.g_zhat_sum[tokens] += (product if affine.gamma is None else product.mul_(affine.gamma)).sum(dim=0)
        g = g.copy_(ds) if affine.gamma is None else torch.mul(ds, affine.gamma, out=g)
        if self.operands.settings.normalize:
            self.g_sum[tokens] += g.sum(dim=0)

    def _through_norm(self, tokens: slice, z: Tensor, g: Tensor) -> None:
        """Add to the gradients of h and W2 what g [V, n] gives them through the LayerNorm over V."""
        operands = self.operands
        rstd = None if operands.statistics is None else operands.statistics.rstd[tokens]
        left = operands.h[tokens] if rstd is None else operands.h[tokens] * rstd.unsqueeze(1)
        mean, mean_product = self.g_sum[tokens] / z.shape[0], self.g_zhat_sum[tokens] / z.shape[0]
        acc = z.new_zeros(left.shape[1], left.shape[0])
        for block in operands.blocks(z.shape[1]):
            dz = g[block]
            if operands.settings.normalize and self.constant is None:
                dz.addcmul_(z[block], mean_product, value=-1).sub_(mean)
            self._add_product(self.w2, block, dz, left)
            if self.h is not None:
                acc.addmm_(operands.w2[block].T, dz)
        if self.h is not None:
            self.h[tokens] = acc.T if rstd is None else acc.T * rstd.unsqueeze(1)

    def _add_product(self, total: Tensor | None, block: slice, a: Tensor, b: Tensor) -> None:
        """`total[block] += a @ b`, or `=` in the first chunk."""
        if total is not None:
            total[block].addmm_(a, b, beta=self.keep)


def _add_sum(total: Tensor | None, block: slice, values: Tensor) -> None:
    """Add the sums over tokens of values [B, n] to total [V, 1]."""
    if total is not None:
        total[block] += values.sum(dim=1, keepdim=True)

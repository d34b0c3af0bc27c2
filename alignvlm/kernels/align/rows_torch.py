"""The element-wise part of the operator in plain PyTorch, on one block of logits [N, B] at a time.

A row of such a block is a token, a column a row of the vocabulary.
Everything is computed in fp32 (float64 for float64 inputs); 16-bit blocks of W2 and E are widened as they come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignvlm.kernels.align.common import LOWEST, AffineSums, VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics
from alignvlm.kernels.matmul import wide_dtype


class TorchRows:
    """Tokens prepared for the sweep: `left` is h scaled by 1/std, so that no pass over N x V has to do it."""

    num_buffers = 2

    def __init__(self, h: Tensor, statistics: LogitStatistics | None) -> None:
        self.dtype = wide_dtype(h.dtype)
        self.left = h.to(self.dtype)
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        if statistics is not None:
            self.scale = statistics.rstd.unsqueeze(1)
            self.shift = (statistics.mu * statistics.rstd).unsqueeze(1)
            self.left = self.left * self.scale

    def operand(self, matrix: Tensor) -> Tensor:
        """A block of W2 or E, or the gradient of the output, as this implementation multiplies it."""
        return matrix.to(self.dtype)

    def rescale(self, acc: Tensor, factor: Tensor) -> None:
        """`acc *= factor` per token."""
        acc.mul_(factor.unsqueeze(1))

    def hidden_gradient(self, acc: Tensor) -> Tensor:
        """The gradient of h from the summed products with W2, in place."""
        return acc if self.scale is None else acc.mul_(self.scale)

    def _normalise(self, z: Tensor, out: Tensor) -> Tensor:
        """z [N, B] = left W2^T -> normalised logits before gamma and beta, in `out` or z itself."""
        return z if self.shift is None else torch.sub(z, self.shift, out=out)

    def forward(self, z: Tensor, affine: VocabAffine, peak: Tensor, total: Tensor, out: Tensor) -> Tensor:
        """z [N, B] -> factor [N] for what was summed before, with p relative to the new peak in `out`.

        `out` [N, B] may be z. `peak` [N] is the running maximum and `total` [N] the sum of p; both are updated.
        """
        logits = affine.apply(self._normalise(z, out), out=out)
        new_peak = torch.maximum(peak, logits.amax(dim=1).clamp_min_(LOWEST))
        factor = torch.exp(peak - new_peak)
        peak.copy_(new_peak)
        total.mul_(factor).add_(logits.sub_(new_peak.unsqueeze(1)).exp_().sum(dim=1))
        return factor

    def token_parts(self, block_size: int) -> Tensor:
        """Sums [1, N] of g / std over the vocabulary, for `backward` to add to."""
        del block_size
        return self.left.new_zeros(1, self.left.shape[0])

    def probabilities(self, z: Tensor, affine: VocabAffine, lse: Tensor, out: Tensor) -> Tensor:
        """z [N, B] -> p in `out`, which may be z, given the log of the normaliser [N]."""
        return affine.apply(self._normalise(z, out), out=out).sub_(lse.unsqueeze(1)).exp_()

    def backward(
        self,
        z: Tensor,
        dp: Tensor,
        affine: VocabAffine,
        lse: Tensor,
        delta: Tensor,
        buffers: list[Tensor],
        *,
        store_p: bool,
        token_parts: Tensor | None,
        affine_sums: bool,
    ) -> tuple[Tensor, Tensor, AffineSums]:
        """z, dp [N, B] -> (p, g = gamma p (dp - delta), sums over tokens); sums over the block go to `token_parts`.

        dp and the `num_buffers` buffers [N, B] are overwritten. The first of these may be z, which else is only read.
        """
        del store_p  # p is needed on the way in any case
        first, second = buffers
        zhat = self._normalise(z, first)
        p = affine.apply(zhat, out=second).sub_(lse.unsqueeze(1)).exp_()
        ds = dp.sub_(delta.unsqueeze(1)).mul_(p)
        sums = AffineSums()
        if affine_sums and affine.beta is not None:
            sums.beta = ds.sum(dim=0)
        if affine_sums and affine.gamma is not None:
            sums.gamma = torch.mul(ds, zhat, out=first).sum(dim=0)
        g = ds if affine.gamma is None else ds.mul_(affine.gamma)
        if token_parts is not None and self.scale is not None:
            token_parts[0] += g.sum(dim=1).mul_(self.scale.squeeze(1))
        return p, g, sums

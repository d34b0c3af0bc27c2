"""The element-wise part of the operator in plain PyTorch, in place on one block of logits [N, B] at a time.

A row of such a block is a token, a column a row of the vocabulary.
Everything is computed in fp32 (float64 for float64 inputs); 16-bit blocks of W2 and E are widened as they come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignvlm.kernels.align.common import LOWEST, BlockSums, VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics
from alignvlm.kernels.matmul import wide_dtype


class TorchRows:
    """Tokens prepared for the sweep: `left` is h scaled by 1/std, so that no pass over N x V has to do it."""

    num_buffers = 3

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
        """From the summed products with W2 to the gradient of h (in place)."""
        return acc if self.scale is None else acc.mul_(self.scale)

    def _normalise(self, z: Tensor) -> Tensor:
        """z [N, B] = left W2^T -> normalised logits before gamma and beta, in place."""
        return z if self.shift is None else z.sub_(self.shift)

    def forward(self, z: Tensor, affine: VocabAffine, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [N, B] -> (p relative to the new peak, in place; sums of p [N]; factor [N] for what was summed before).

        `peak` [N] is the running maximum and is updated.
        """
        z = affine.apply(self._normalise(z), out=z)
        new_peak = torch.maximum(peak, z.amax(dim=1).clamp_min_(LOWEST))
        factor = torch.exp(peak - new_peak)
        peak.copy_(new_peak)
        p = z.sub_(new_peak.unsqueeze(1)).exp_()
        return p, p.sum(dim=1), factor

    def probabilities(self, z: Tensor, affine: VocabAffine, lse: Tensor) -> Tensor:
        """z [N, B] -> p, in place, given the log of the normaliser [N]."""
        return affine.apply(self._normalise(z), out=z).sub_(lse.unsqueeze(1)).exp_()

    def backward(
        self,
        z: Tensor,
        dp: Tensor,
        affine: VocabAffine,
        lse: Tensor,
        delta: Tensor,
        scratch: list[Tensor],
        *,
        store_p: bool,
        affine_sums: bool,
    ) -> tuple[Tensor, Tensor, BlockSums]:
        """z, dp [N, B] -> (p, g = gamma p (dp - delta), sums of them); all three buffers are overwritten."""
        del store_p  # p is needed on the way in any case
        zhat = self._normalise(z)
        p = affine.apply(zhat, out=scratch[0]).sub_(lse.unsqueeze(1)).exp_()
        ds = dp.sub_(delta.unsqueeze(1)).mul_(p)
        sums = BlockSums()
        if affine_sums and affine.beta is not None:
            sums.beta = ds.sum(dim=0)
        g, product = ds, zhat
        if self.shift is not None or (affine_sums and affine.gamma is not None):
            product = torch.mul(ds, zhat, out=zhat)
            if affine_sums and affine.gamma is not None:
                sums.gamma = product.sum(dim=0)
        if affine.gamma is not None:
            g = ds.mul_(affine.gamma)
        if self.shift is not None:
            # A pass of multiplications and a plain sum: several times faster on a CPU than a matrix-vector product.
            weighted = product if affine.gamma is None else product.mul_(affine.gamma)
            sums.g, sums.g_zhat = g.sum(dim=1), weighted.sum(dim=1)
        return p, g, sums

"""What both algorithms share: settings, the affine after the LayerNorm over V, views of buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvlm.kernels.align.moments import Moments

LOWEST = -1e30
"""Least running maximum: a token whose block is masked by -inf everywhere must not turn into nan."""


@dataclass(frozen=True)
class Settings:
    """The operator's arguments that need no gradient."""

    eps: float
    """Epsilon of the LayerNorm over V."""
    normalize: bool
    """Whether there is a LayerNorm over V."""
    moments: Moments | None = None
    """Moments of W2 that are known already; None: the algorithm finds the statistics of the logits in its own way."""
    block: int | None = None
    """Vocabulary rows per block; None chooses."""
    kept_bytes: int = 0
    """Bytes for logits that a forward pass keeps for its backward pass, which need not compute them again."""
    needs_grad: bool = True
    """False in inference, where the statistics of a few tokens are cheaper from their logits than from W2's moments."""


@dataclass(frozen=True)
class NeedsGrad:
    """Which inputs require a gradient."""

    h: bool
    w2: bool
    e: bool
    gamma: bool
    beta: bool

    @property
    def affine(self) -> bool:
        """Whether gamma or beta does."""
        return self.gamma or self.beta

    @property
    def logits(self) -> bool:
        """Whether anything does that reaches the output through the logits."""
        return self.h or self.w2 or self.affine


@dataclass(frozen=True)
class VocabAffine:
    """Scale and shift of normalised logits per vocabulary row, in fp32 (float64 for float64 inputs)."""

    gamma: Tensor | None
    """[B], or [B, 1] where logits lie transposed"""
    beta: Tensor | None
    """as gamma"""

    def block(self, block: slice) -> VocabAffine:
        """The same for a block of the vocabulary."""
        return VocabAffine(*(None if part is None else part[block] for part in (self.gamma, self.beta)))

    def apply(self, zhat: Tensor, out: Tensor) -> Tensor:
        """out = gamma zhat + beta for a block of normalised logits, [N, B] or transposed; `out` may be zhat."""
        if self.gamma is not None:
            scaled = torch.mul(zhat, self.gamma, out=out)
            # Two passes in the cache take half the time of addcmul, which does not vectorise over two such vectors.
            return scaled if self.beta is None else scaled.add_(self.beta)
        if self.beta is not None:
            return torch.add(zhat, self.beta, out=out)
        return zhat if out is zhat else out.copy_(zhat)


@dataclass
class AffineSums:
    """What the backward of one block of the vocabulary sums up over tokens; None where nobody asked."""

    gamma: Tensor | None = None
    """[B] sum of ds zhat"""
    beta: Tensor | None = None
    """[B] sum of ds"""


def blocks_of(vocab_size: int, block: int) -> Iterator[slice]:
    """The vocabulary in blocks of rows; the last one may be smaller."""
    for start in range(0, vocab_size, block):
        yield slice(start, min(start + block, vocab_size))


def matrix_in(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """A contiguous [num_rows, num_columns] at the start of a flat buffer: a last block or chunk may be smaller."""
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)

"""What the parts of the operator tell each other: vectors over the vocabulary, their gradients, and who needs which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -1e30
"""Least running maximum: a token whose block is masked by -inf everywhere must not turn into nan."""


def blocks_of(vocab_size: int, block: int) -> Iterator[slice]:
    """The vocabulary in blocks of rows; the last one may be smaller."""
    for start in range(0, vocab_size, block):
        yield slice(start, min(start + block, vocab_size))


def matrix_in(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """A contiguous [num_rows, num_columns] at the start of a flat buffer: a last block or chunk may be smaller."""
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)


@dataclass
class Needs:
    """Which inputs require a gradient."""

    h: bool
    w2: bool
    e: bool
    gamma: bool
    beta: bool

    @property
    def columns(self) -> bool:
        return self.gamma or self.beta

    @property
    def logits(self) -> bool:
        return self.h or self.w2 or self.columns


@dataclass
class Columns:
    """Per vocabulary row v, in fp32 (float64 for float64 inputs): logit = gamma zhat + beta."""

    gamma: Tensor | None
    """[B], or [B, 1] where logits lie transposed"""
    beta: Tensor | None
    """as gamma"""

    def block(self, rows: slice) -> Columns:
        """The same for some rows of the vocabulary."""
        parts = (None if part is None else part[rows] for part in (self.gamma, self.beta))
        return Columns(*parts)

    def affine(self, zhat: Tensor, out: Tensor) -> Tensor:
        """out = gamma zhat + beta for a block of normalised logits, [N, B] or transposed; `out` may be zhat."""
        if self.gamma is not None:
            scaled = torch.mul(zhat, self.gamma, out=out)
            # Two passes in the cache take half the time of addcmul, which does not vectorise over two such vectors.
            return scaled if self.beta is None else scaled.add_(self.beta)
        if self.beta is not None:
            return torch.add(zhat, self.beta, out=out)
        return zhat if out is zhat else out.copy_(zhat)


@dataclass
class ColumnGradients:
    """What the backward of one block sums up besides the matrix products; None where nobody asked."""

    gamma: Tensor | None = None
    """[B] sum over rows of ds zhat"""
    beta: Tensor | None = None
    """[B] sum over rows of ds"""
    row: Tensor | None = None
    """[N] sum over the block of g = gamma ds"""
    row_product: Tensor | None = None
    """[N] sum over the block of g zhat"""

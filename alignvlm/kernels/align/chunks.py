"""Tokens in chunks, and the logits of one chunk against the whole vocabulary: what both directions share.

Logits lie transposed, [V, n]: a CPU multiplies many rows by few columns faster than the reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignvlm.kernels.align.moments import Moments, RowStatistics, row_statistics
from alignvlm.kernels.align.vectors import Columns, blocks_of
from alignvlm.kernels.matmul import product_nt

CHUNK = 384
"""Tokens of a chunk: its halves are whole register tiles of fp32 kernels (16, 48, 64)."""
_BLOCK_VALUES = 3 << 18
"""Logits per block: 3 MiB in fp32, which stay in the cache."""


def chunks_of(num_tokens: int) -> list[slice]:
    """Chunks of the forward; the first one takes what is left over."""
    if num_tokens == 0:
        return []
    edges = [0, *range((num_tokens - 1) % CHUNK + 1, num_tokens + 1, CHUNK)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def backward_chunks_of(num_tokens: int) -> list[slice]:
    """Chunks of the backward in its order: the last one whole, the others by halves, two tensors held of each."""
    chunks = chunks_of(num_tokens)
    return chunks[-1:] + [half for chunk in reversed(chunks[:-1]) for half in _halves(chunk)]


def _halves(chunk: slice) -> tuple[slice, ...]:
    size = chunk.stop - chunk.start
    if size <= CHUNK // 2:
        return (chunk,)
    middle = chunk.start + (size + 1) // 2
    return slice(chunk.start, middle), slice(middle, chunk.stop)


def block_size(num_tokens: int) -> int:
    """Rows of the vocabulary whose logits for this many tokens are worked on together."""
    return max(_BLOCK_VALUES // num_tokens, 1)


@dataclass(frozen=True)
class ChunkSettings:
    """What does not need a gradient."""

    eps: float
    normalize: bool
    moments: Moments | None
    """Statistics of W2 that are known already; None takes the LayerNorm's sums from the logits."""
    block: int | None
    """Vocabulary rows per block; None chooses."""

    @property
    def sweeps_statistics(self) -> bool:
        return self.normalize and self.moments is None


class Operands:
    """The operator's inputs, the LayerNorm's statistics, and the logits of some tokens."""

    def __init__(
        self,
        h: Tensor,
        w2: Tensor,
        e: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        settings: ChunkSettings,
        statistics: RowStatistics | None = None,
    ) -> None:
        self.h, self.w2, self.e, self.settings = h, w2, e, settings
        parts = (None if part is None else part.to(h.dtype).unsqueeze(1) for part in (gamma, beta))
        self.columns = Columns(*parts)  # [V, 1]
        self.statistics = self._first_statistics() if statistics is None else statistics

    def _first_statistics(self) -> RowStatistics | None:
        """The LayerNorm's statistics before there are logits; std is 1 until they have been swept."""
        if not self.settings.normalize:
            return None
        if self.settings.moments is not None:
            return row_statistics(self.h, self.settings.moments, self.settings.eps)
        mu = self.h @ self.w2.mean(dim=0)
        return RowStatistics(mu, torch.ones_like(mu))

    def store(self) -> Tensor:
        """Memory for [V, n] of any chunk of the forward, or for two of a half of one."""
        return self.h.new_empty(self.w2.shape[0] * min(self.h.shape[0], CHUNK))

    def matrix(self, store: Tensor, rows: slice, place: int = 0) -> Tensor:
        """[V, n] for some tokens in a store: its first, or the one after that."""
        num_tokens = rows.stop - rows.start
        size = self.w2.shape[0] * num_tokens
        return store[place * size : (place + 1) * size].view(-1, num_tokens)

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        """Blocks of the vocabulary for this many tokens."""
        return blocks_of(self.w2.shape[0], self.settings.block or block_size(num_tokens))

    def logits(self, rows: slice, z: Tensor) -> Iterator[slice]:
        """Fill z [V, n] with the logits of some tokens, normalised by `statistics`; yields each block when filled.

        The same operations in the same order whether 1/std is known yet or not, so that a backward finds the forward's
        logits: a large logit off by its last bit would leave a softmax that does not sum to one.
        """
        h, statistics = self.h[rows], self.statistics
        shift = None if statistics is None else -statistics.mu[rows]
        for block in self.blocks(z.shape[1]):
            logits = product_nt(self.w2[block], h, shift)
            if statistics is None:
                z[block] = logits
            else:
                torch.mul(logits, statistics.rstd[rows], out=z[block])
            del logits  # its memory, still in the cache, is the next one's
            yield block

"""Floors of the ALIGN operator: its own matrix products as it sweeps them, or seven plain ones; nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _common import Problem
from torch import Tensor

from alignvlm.kernels import vocab_moments
from alignvlm.kernels.align.common import blocks_of
from alignvlm.kernels.align.moments import add_hidden_gradient, add_weight_gradient, logit_statistics
from alignvlm.kernels.align.token_chunks import block_size, chunks_of
from alignvlm.kernels.align.vocab_blocks import default_block
from alignvlm.kernels.matmul import accumulate, product_into, product_nt


class TokenChunksFloor:
    """On a CPU: chunks of tokens against the whole vocabulary."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def blocks(self, tokens: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the vocabulary, a block [B, n] in place of logits) for a chunk of tokens."""
        num_tokens = tokens.stop - tokens.start
        for block in blocks_of(self.problem.shape.vocab, block_size(num_tokens)):
            yield block, self.problem.h.new_ones(block.stop - block.start, num_tokens)

    def forward(self) -> None:
        problem = self.problem
        for tokens in chunks_of(problem.shape.tokens):
            acc = problem.h.new_zeros(problem.shape.width, tokens.stop - tokens.start)
            for block, z in self.blocks(tokens):
                product_nt(problem.w2[block], problem.h[tokens])
                acc.addmm_(problem.e[block].T, z)

    def backward(self) -> None:
        problem = self.problem
        first, *_ = chunks = chunks_of(problem.shape.tokens)[::-1]
        grad_w2, grad_e = torch.empty_like(problem.w2), torch.empty_like(problem.e)
        for tokens in chunks:
            acc = problem.h.new_zeros(problem.shape.width, tokens.stop - tokens.start)
            for block, z in self.blocks(tokens):
                if tokens is not first:
                    product_nt(problem.w2[block], problem.h[tokens])
                product_nt(problem.e[block], problem.upstream[tokens])
                for grad, right in ((grad_e, problem.upstream[tokens]), (grad_w2, problem.h[tokens])):
                    if tokens is first:
                        torch.mm(z, right, out=grad[block])
                    else:
                        grad[block].addmm_(z, right)
                acc.addmm_(problem.w2[block].T, z)


class VocabBlocksFloor:
    """On a GPU: all tokens against blocks of the vocabulary."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        shape = problem.shape
        self.block = default_block(shape.tokens, shape.vocab, problem.h.dtype, problem.h.device)
        self.z = problem.h.new_empty(shape.tokens * self.block)
        self.moments = vocab_moments(problem.w2)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the vocabulary, memory [N, B] for their logits)"""
        shape = self.problem.shape
        for block in blocks_of(shape.vocab, self.block):
            size = block.stop - block.start
            yield block, self.z[: shape.tokens * size].view(shape.tokens, size)

    def forward(self) -> None:
        problem = self.problem
        moments = vocab_moments(problem.w2)
        logit_statistics(problem.h, moments, 1e-5)
        acc = torch.zeros_like(problem.h, dtype=moments.mean.dtype)
        for block, z in self.blocks():
            product_into(z, problem.h, problem.w2[block].T)
            accumulate(acc, z, problem.e[block])

    def backward(self) -> None:
        problem = self.problem
        acc = torch.zeros_like(problem.h, dtype=self.moments.mean.dtype)
        grad_w2, grad_e = torch.empty_like(problem.w2), torch.empty_like(problem.e)
        for block, z in self.blocks():
            product_into(z, problem.h, problem.w2[block].T)
            product_into(z, problem.upstream, problem.e[block].T)
            product_into(grad_e[block], z.T, problem.upstream)
            accumulate(acc, z, problem.w2[block])
            product_into(grad_w2[block], z.T, problem.h)
        zeros = acc.new_zeros(len(acc))
        add_hidden_gradient(acc, problem.h, self.moments, zeros, zeros)
        add_weight_gradient(grad_w2, problem.h, problem.w2, self.moments, zeros, zeros)


class PlainFloor:
    """Seven products of 2 N D V FLOPs, each as one call of the library and rounded to the dtype of the inputs.

    It holds one N x V matrix.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def forward(self) -> None:
        problem = self.problem
        torch.mm(torch.mm(problem.h, problem.w2.T), problem.e)

    def backward(self) -> None:
        problem = self.problem
        z = torch.mm(problem.h, problem.w2.T)
        torch.mm(z.T, problem.upstream)
        g = torch.mm(problem.upstream, problem.e.T, out=z)
        torch.mm(g, problem.w2)
        torch.mm(g.T, problem.h)


Floor = TokenChunksFloor | VocabBlocksFloor | PlainFloor

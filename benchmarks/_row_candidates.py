"""Row kernels that `row_kernels.py` compares with those of the operator, all with LayerNorm and affine.

Loads inside `tl.range(num_stages=...)` are asynchronous copies of the next tokens' rows into shared memory; gamma and
beta stay in registers, and a token's numbers are scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LAG = tl.constexpr(8.0)


@triton.jit
def forward_rows(
    z_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, peak_ptr, mass_ptr, factor_ptr, num_tokens, width,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a block, one after the other: z -> p in place, relative to the running maximum `peak`."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    vocab = tl.arange(0, BLOCK)
    inside = vocab < width
    gamma = tl.load(gamma_ptr + vocab, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + vocab, mask=inside, other=float("-inf"))
    for token in tl.range(first, min(first + ROWS, num_tokens), num_stages=STAGES):
        row = token * width + vocab
        z = tl.load(z_ptr + row, mask=inside, other=0.0).to(tl.float32)
        mu, rstd = tl.load(mu_ptr + token), tl.load(rstd_ptr + token)
        logits = (z - mu) * rstd * gamma + beta
        before = tl.load(peak_ptr + token)
        highest = tl.maximum(tl.max(logits, axis=0), -1e30)
        peak = tl.where(highest > before + _LAG, highest, before)
        p = tl.exp(logits - peak)
        tl.store(mass_ptr + token, tl.sum(p, axis=0))
        tl.store(factor_ptr + token, tl.exp(before - peak))
        tl.store(peak_ptr + token, peak)
        tl.store(z_ptr + row, p.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_steps(
    z_ptr, dp_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    g_sum_ptr, gamma_grad_ptr, beta_grad_ptr, num_tokens, width,
    TILE_TOKENS: tl.constexpr, TILE_VOCAB: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile, STEP tokens at a time: z -> p, dp -> g / std in place; sums of g / std, ds zhat and ds."""
    tile_token, tile_vocab = tl.program_id(0), tl.program_id(1)
    vocab = tile_vocab * TILE_VOCAB + tl.arange(0, TILE_VOCAB)
    inside_vocab = vocab < width
    gamma = tl.load(gamma_ptr + vocab, mask=inside_vocab, other=0.0)[None, :]
    beta = tl.load(beta_ptr + vocab, mask=inside_vocab, other=0.0)[None, :]
    sum_gamma, sum_beta = tl.zeros([TILE_VOCAB], tl.float32), tl.zeros([TILE_VOCAB], tl.float32)
    begin = tile_token * TILE_TOKENS
    for start in tl.range(begin, min(begin + TILE_TOKENS, num_tokens), STEP, num_stages=STAGES):
        tokens = start + tl.arange(0, STEP)
        inside_tokens = tokens < num_tokens
        inside = inside_tokens[:, None] & inside_vocab[None, :]
        offsets = tokens.to(tl.int64)[:, None] * width + vocab[None, :]
        z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(dp_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + tokens, mask=inside_tokens, other=float("inf"))[:, None]
        delta = tl.load(delta_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
        mu = tl.load(mu_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
        zhat = (z - mu) * rstd
        p = tl.exp(zhat * gamma + beta - lse)
        ds = p * (dp - delta)
        g = (ds * gamma * rstd).to(dp_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets, p.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + offsets, g, mask=inside)
        partial = tile_vocab.to(tl.int64) * num_tokens + tokens
        tl.store(g_sum_ptr + partial, tl.sum(g.to(tl.float32), axis=1), mask=inside_tokens)
        sum_gamma += tl.sum(ds * zhat, axis=0)
        sum_beta += tl.sum(ds, axis=0)
    partial = tile_token.to(tl.int64) * width + vocab
    tl.store(gamma_grad_ptr + partial, sum_gamma, mask=inside_vocab)
    tl.store(beta_grad_ptr + partial, sum_beta, mask=inside_vocab)


@triton.jit
def backward_rows(
    z_ptr, dp_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    g_sum_ptr, gamma_grad_ptr, beta_grad_ptr, num_tokens, width,
    TILE_TOKENS: tl.constexpr, TILE_VOCAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same, one token at a time."""
    tile_token, tile_vocab = tl.program_id(0), tl.program_id(1)
    vocab = tile_vocab * TILE_VOCAB + tl.arange(0, TILE_VOCAB)
    inside = vocab < width
    gamma = tl.load(gamma_ptr + vocab, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + vocab, mask=inside, other=0.0)
    sum_gamma, sum_beta = tl.zeros([TILE_VOCAB], tl.float32), tl.zeros([TILE_VOCAB], tl.float32)
    begin = tile_token.to(tl.int64) * TILE_TOKENS
    for token in tl.range(begin, min(begin + TILE_TOKENS, num_tokens), num_stages=STAGES):
        row = token * width + vocab
        z = tl.load(z_ptr + row, mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(dp_ptr + row, mask=inside, other=0.0).to(tl.float32)
        lse, delta = tl.load(lse_ptr + token), tl.load(delta_ptr + token)
        mu, rstd = tl.load(mu_ptr + token), tl.load(rstd_ptr + token)
        zhat = (z - mu) * rstd
        p = tl.exp(zhat * gamma + beta - lse)
        ds = p * (dp - delta)
        g = (ds * gamma * rstd).to(dp_ptr.dtype.element_ty)
        tl.store(z_ptr + row, p.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + row, g, mask=inside)
        tl.store(g_sum_ptr + tile_vocab.to(tl.int64) * num_tokens + token, tl.sum(g.to(tl.float32), axis=0))
        sum_gamma += ds * zhat
        sum_beta += ds
    partial = tile_token.to(tl.int64) * width + vocab
    tl.store(gamma_grad_ptr + partial, sum_gamma, mask=inside)
    tl.store(beta_grad_ptr + partial, sum_beta, mask=inside)

"""What `row_kernels.py` compares with the operator's parts: what they were before, and other ways to do them."""

from __future__ import annotations

from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from alignvlm.kernels.matmul import accumulate

_LAG = tl.constexpr(8.0)


@triton.jit
def _logits(
    z, gamma_ptr, beta_ptr, vocab, inside, mu, rstd,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """z [..., C] in fp32 -> (zhat, gamma zhat + beta, gamma)."""
    gamma = tl.full(vocab.shape, 1.0, tl.float32)
    if HAS_NORM:
        z = (z - mu) * rstd
    logits = z
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + vocab, mask=inside, other=0.0)
        logits = logits * gamma
    if HAS_BETA:
        logits += tl.load(beta_ptr + vocab, mask=inside, other=0.0)
    return z, logits, gamma


@triton.jit
def forward_before(
    z_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, peak_ptr, mass_ptr, factor_ptr, width,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of a block: z -> p in place. With HAS_LSE p is final, else relative to the running maximum `peak`."""
    token = tl.program_id(0).to(tl.int64)
    vocab = tl.arange(0, BLOCK)
    inside = vocab < width
    z = tl.load(z_ptr + token * width + vocab, mask=inside, other=0.0).to(tl.float32)
    mu, rstd = 0.0, 1.0
    if HAS_NORM:
        mu, rstd = tl.load(mu_ptr + token), tl.load(rstd_ptr + token)
    _, logits, _ = _logits(z, gamma_ptr, beta_ptr, vocab, inside, mu, rstd, HAS_NORM, HAS_GAMMA, HAS_BETA)
    logits = tl.where(inside, logits, float("-inf"))
    if HAS_LSE:
        p = tl.exp(logits - tl.load(lse_ptr + token))
    else:
        before = tl.load(peak_ptr + token)
        highest = tl.maximum(tl.max(logits, axis=0), -1e30)  # a token masked everywhere must not turn into nan
        peak = tl.where(highest > before + _LAG, highest, before)
        p = tl.exp(logits - peak)
        tl.store(mass_ptr + token, tl.sum(p, axis=0))
        tl.store(factor_ptr + token, tl.exp(before - peak))
        tl.store(peak_ptr + token, peak)
    tl.store(z_ptr + token * width + vocab, p.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_before(
    z_ptr, dp_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    g_sum_ptr, g_zhat_sum_ptr, gamma_grad_ptr, beta_grad_ptr, num_tokens, width,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    STORE_P: tl.constexpr, AFFINE_SUMS: tl.constexpr,
    TILE_TOKENS: tl.constexpr, TILE_VOCAB: tl.constexpr, STEP_TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile: z -> p and dp -> gamma p (dp - delta) / std in place, with partial sums over both dimensions."""
    tile_token, tile_vocab = tl.program_id(0), tl.program_id(1)
    vocab = tile_vocab * TILE_VOCAB + tl.arange(0, TILE_VOCAB)[None, :]
    inside_vocab = vocab < width
    sum_gamma = tl.zeros([STEP_TOKENS, TILE_VOCAB], tl.float32)
    sum_beta = tl.zeros([STEP_TOKENS, TILE_VOCAB], tl.float32)
    for start in range(0, TILE_TOKENS, STEP_TOKENS):
        tokens = tile_token * TILE_TOKENS + start + tl.arange(0, STEP_TOKENS)[:, None]
        inside_tokens = tokens < num_tokens
        inside = inside_tokens & inside_vocab
        offsets = tokens.to(tl.int64) * width + vocab
        z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(dp_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + tokens, mask=inside_tokens, other=0.0)
        delta = tl.load(delta_ptr + tokens, mask=inside_tokens, other=0.0)
        mu, rstd = 0.0, 1.0
        if HAS_NORM:
            mu = tl.load(mu_ptr + tokens, mask=inside_tokens, other=0.0)
            rstd = tl.load(rstd_ptr + tokens, mask=inside_tokens, other=0.0)
        zhat, logits, gamma = _logits(
            z, gamma_ptr, beta_ptr, vocab, inside_vocab, mu, rstd, HAS_NORM, HAS_GAMMA, HAS_BETA
        )
        p = tl.where(inside, tl.exp(logits - lse), 0.0)
        ds = p * (dp - delta)
        g = ds * gamma
        scaled = g * rstd
        if STORE_P:
            tl.store(z_ptr + offsets, p.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + offsets, scaled.to(dp_ptr.dtype.element_ty), mask=inside)
        if HAS_NORM:
            partial = tile_vocab.to(tl.int64) * num_tokens + tokens
            tl.store(g_sum_ptr + partial, tl.sum(g, axis=1)[:, None], mask=inside_tokens)
            tl.store(g_zhat_sum_ptr + partial, tl.sum(g * zhat, axis=1)[:, None], mask=inside_tokens)
        if AFFINE_SUMS:
            if HAS_GAMMA:
                sum_gamma += ds * zhat
            if HAS_BETA:
                sum_beta += ds
    if AFFINE_SUMS:
        partial = tile_token.to(tl.int64) * width + vocab
        if HAS_GAMMA:
            tl.store(gamma_grad_ptr + partial, tl.sum(sum_gamma, axis=0)[None, :], mask=inside_vocab)
        if HAS_BETA:
            tl.store(beta_grad_ptr + partial, tl.sum(sum_beta, axis=0)[None, :], mask=inside_vocab)


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
def backward_fused(
    h_tile, w2_tile, upstream_tile, e_tile, p_tile, g_tile, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    g_sum_ptr, gamma_grad_ptr, beta_grad_ptr, num_tokens, width, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of p and g / std straight from h, W2, dO and E: two accumulators, and no logits in memory."""
    program = tl.program_id(0)
    num_m, num_n = tl.cdiv(num_tokens, BM), tl.cdiv(width, BN)
    first = program // (GROUP * num_n) * GROUP
    size = min(num_m - first, GROUP)
    tile_m, tile_n = first + program % (GROUP * num_n) % size, program % (GROUP * num_n) // size
    m, n = tile_m * BM, tile_n * BN
    z, dp = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, depth, BK):
        z = tl.dot(h_tile.load([m, k]), w2_tile.load([n, k]).T, z)
        dp = tl.dot(upstream_tile.load([m, k]), e_tile.load([n, k]).T, dp)
    tokens, vocab = m + tl.arange(0, BM), n + tl.arange(0, BN)
    inside_tokens, inside_vocab = tokens < num_tokens, vocab < width
    mu = tl.load(mu_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
    lse = tl.load(lse_ptr + tokens, mask=inside_tokens, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + tokens, mask=inside_tokens, other=0.0)[:, None]
    gamma = tl.load(gamma_ptr + vocab, mask=inside_vocab, other=0.0)[None, :]
    beta = tl.load(beta_ptr + vocab, mask=inside_vocab, other=float("-inf"))[None, :]
    zhat = (z - mu) * rstd
    p = tl.exp(zhat * gamma + beta - lse)
    p_tile.store([m, n], p.to(p_tile.dtype))
    ds = p * (dp - delta)
    tl.store(beta_grad_ptr + tile_m.to(tl.int64) * width + vocab, tl.sum(ds, axis=0), mask=inside_vocab)
    tl.store(gamma_grad_ptr + tile_m.to(tl.int64) * width + vocab, tl.sum(ds * zhat, axis=0), mask=inside_vocab)
    g = (ds * gamma * rstd).to(g_tile.dtype)
    g_tile.store([m, n], g)
    tl.store(
        g_sum_ptr + tile_n.to(tl.int64) * num_tokens + tokens, tl.sum(g.to(tl.float32), axis=1), mask=inside_tokens
    )


def gram_in_tiles(w2: Tensor, gram: Tensor, rows: int = 4096) -> None:
    """gram += W2^T W2 as before: blocks of rows, six of nine products of thirds of the columns."""
    width = gram.shape[0]
    edges = [round(width * i / 3) for i in range(4)]
    for start in range(0, len(w2), rows):
        block = w2[start : start + rows]
        for left in (slice(a, b) for a, b in pairwise(edges)):
            accumulate(gram[left, left.start :], block[:, left].T, block[:, left.start :])


def correct_in_fp32(grad_w2: Tensor, w2: Tensor, second: Tensor, row: Tensor, rows: int = 4096) -> None:
    """grad_w2 += W2 second + row as before: blocks of rows are widened, added to, and rounded."""
    for start in range(0, len(w2), rows):
        block = slice(start, start + rows)
        target = grad_w2[block].to(row.dtype)
        accumulate(target, w2[block], second)
        target += row
        grad_w2[block] = target

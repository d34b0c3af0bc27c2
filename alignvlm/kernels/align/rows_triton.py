"""The element-wise part of the operator as Triton kernels: one read and one write of each block of logits [N, B].

Used on CUDA; runs on CPU tensors under TRITON_INTERPRET=1 for tests. Logits, probabilities and their gradients stay in
the dtype of h (bf16), statistics and sums in fp32. Sums over tiles go through partial buffers, never through atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvlm.kernels.align.common import BlockSums, VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics

# Fixed, so that partial sums have the same order whatever the autotuner picks inside a tile.
_TILE_TOKENS = 128
_TILE_VOCAB = 512
_STEP_TOKENS = 4
_FIXED = {"num_warps": 8, "num_stages": 2}

# A running maximum may lag behind the true one by this much: exp(8) is harmless in bf16 and in fp32, and in return the
# [N, D] accumulator is rescaled in the first blocks only.
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
def _forward_kernel(
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
def _backward_kernel(
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
def _rescale_kernel(acc_ptr, factor_ptr, width, BLOCK: tl.constexpr):
    """acc[token] *= factor[token], leaving alone tokens whose factor is 1 (nearly all after the first block)."""
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + token)
    if factor != 1.0:
        vocab = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = vocab < width
        acc = tl.load(acc_ptr + token * width + vocab, mask=inside, other=0.0)
        # The first factor is exp(-inf) = 0: the accumulator holds zeros then.
        tl.store(acc_ptr + token * width + vocab, acc * factor, mask=inside)


@functools.cache
def _tuned(kernel: Any, key: tuple[str, ...], restore: tuple[str, ...], steps: tuple[int, ...] = ()) -> Any:
    """The kernel with autotuning; what it overwrites is restored between trials. Needs a GPU."""
    extra = [{"STEP_TOKENS": step} for step in steps] or [{}]
    configs = [
        triton.Config(meta, num_warps=warps, num_stages=stages)
        for meta in extra
        for warps in (4, 8, 16)
        for stages in ((1,) if not steps else (2, 3))
    ]
    return triton.autotune(configs, key=list(key), restore_value=list(restore), cache_results=True)(kernel)


def _autotunes(tensor: Tensor) -> bool:
    """Tuning may pick another reduction order on another day, so deterministic mode takes the fixed configuration."""
    return tensor.is_cuda and not torch.are_deterministic_algorithms_enabled()


class TritonRows:
    """The sweep's row implementation on raw logits: `left` is h itself, 1/std is applied inside the kernels."""

    num_buffers = 2

    def __init__(self, h: Tensor, statistics: LogitStatistics | None) -> None:
        self.left = h.contiguous()
        self.mu = None if statistics is None else statistics.mu
        self.rstd = None if statistics is None else statistics.rstd

    def operand(self, matrix: Tensor) -> Tensor:
        """Blocks enter the matrix products as they are."""
        return matrix

    def rescale(self, acc: Tensor, factor: Tensor) -> None:
        """`acc *= factor` per token, leaving alone those whose factor is 1."""
        width = acc.shape[1]
        block = min(triton.next_power_of_2(width), 1024)
        _rescale_kernel[(acc.shape[0], triton.cdiv(width, block))](acc, factor, width, BLOCK=block)

    def hidden_gradient(self, acc: Tensor) -> Tensor:
        """1/std is already inside."""
        return acc

    def _flags(self, affine: VocabAffine) -> dict[str, bool]:
        return {
            "HAS_NORM": self.mu is not None,
            "HAS_GAMMA": affine.gamma is not None,
            "HAS_BETA": affine.beta is not None,
        }

    def forward(self, z: Tensor, affine: VocabAffine, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in TorchRows; `peak` may lag behind the true maximum by a constant."""
        mass, factor = torch.empty_like(peak), torch.empty_like(peak)
        self._run_forward(z, affine, None, peak, mass, factor)
        return z, mass, factor

    def probabilities(self, z: Tensor, affine: VocabAffine, lse: Tensor) -> Tensor:
        """As in TorchRows."""
        self._run_forward(z, affine, lse, None, None, None)
        return z

    def _run_forward(
        self,
        z: Tensor,
        affine: VocabAffine,
        lse: Tensor | None,
        peak: Tensor | None,
        mass: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        num_tokens, width = z.shape
        arguments = (
            z, self.mu, self.rstd, affine.gamma, affine.beta, lse, peak, mass, factor, width,
        )  # fmt: skip
        flags = {**self._flags(affine), "HAS_LSE": lse is not None, "BLOCK": triton.next_power_of_2(width)}
        if _autotunes(z):
            restore = ("z_ptr",) if peak is None else ("z_ptr", "peak_ptr")
            _tuned(_forward_kernel, ("width",), restore)[(num_tokens,)](*arguments, **flags)
        else:
            _forward_kernel[(num_tokens,)](*arguments, **flags, **_FIXED)

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
        """As in TorchRows, except that the returned gradient already contains 1/std; `scratch` is not needed."""
        del scratch
        num_tokens, width = z.shape
        tiles = (triton.cdiv(num_tokens, _TILE_TOKENS), triton.cdiv(width, _TILE_VOCAB))
        sums = BlockSums()
        token_parts = [lse.new_empty(tiles[1], num_tokens) if self.mu is not None else None for _ in range(2)]
        affine_parts = [
            lse.new_empty(tiles[0], width) if affine_sums and part is not None else None
            for part in (affine.gamma, affine.beta)
        ]
        arguments = (
            z, dp, self.mu, self.rstd, affine.gamma, affine.beta, lse, delta,
            *token_parts, *affine_parts, num_tokens, width,
        )  # fmt: skip
        flags = {
            **self._flags(affine),
            "STORE_P": store_p,
            "AFFINE_SUMS": affine_sums,
            "TILE_TOKENS": _TILE_TOKENS,
            "TILE_VOCAB": _TILE_VOCAB,
        }
        if _autotunes(z):
            kernel = _tuned(_backward_kernel, ("width", "STORE_P", "AFFINE_SUMS"), ("z_ptr", "dp_ptr"), (2, 4, 8))
            kernel[tiles](*arguments, **flags)
        else:
            _backward_kernel[tiles](*arguments, **flags, STEP_TOKENS=_STEP_TOKENS, **_FIXED)
        sums.g, sums.g_zhat = (None if part is None else part.sum(dim=0) for part in token_parts)
        sums.gamma, sums.beta = (None if part is None else part.sum(dim=0) for part in affine_parts)
        return z, dp, sums

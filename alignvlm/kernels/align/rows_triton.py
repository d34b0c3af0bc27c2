"""The element-wise part of the operator as Triton kernels: one read and one write of each block of logits [N, B].

Used on CUDA; runs on CPU tensors under TRITON_INTERPRET=1 for tests. Logits, probabilities and their gradients stay in
the dtype of h (bf16), statistics and sums in fp32. Sums over tiles go through partial buffers, never through atomics,
and nothing is tuned at run time: `benchmarks/row_kernels.py` measures the configurations that are fixed here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignvlm.kernels.align.common import AffineSums, VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics

# Fixed, so that every sum has one order: the fastest of benchmarks/results/row_kernels.json on an H100, at 0.9 of the
# bandwidth of a device copy. Rows come through shared memory, _STAGES - 1 tokens ahead of the arithmetic.
_TILE_VOCAB = 2048
_STAGES = 3
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

# A running maximum may lag behind the true one by this much: exp(8) is harmless in bf16 and in fp32, and in return the
# [N, D] accumulator is rescaled in the first blocks only.
_LAG = tl.constexpr(8.0)


def _rows_per_program(block: int) -> int:
    """Tokens that share one load of gamma and beta; wider rows leave registers for one program per SM only."""
    return 8 if block <= 8192 else 32


def _tile_tokens(num_tokens: int, num_tiles: int, device: torch.device) -> int:
    """Tokens of a tile when each has `num_tiles` tiles beside it: six programs per SM, which run in whole waves.

    Two or three fit on an SM at once, as the compiler takes registers.
    """
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(triton.cdiv(num_tokens * num_tiles, 6 * num_sms), 16)


@triton.jit
def _affine(gamma_ptr, beta_ptr, vocab, inside, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr):
    """(gamma, beta) of some rows of the vocabulary, 1 and 0 where there are none."""
    gamma, beta = 1.0, 0.0
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + vocab, mask=inside, other=0.0)
    if HAS_BETA:
        beta = tl.load(beta_ptr + vocab, mask=inside, other=0.0)
    return gamma, beta


@triton.jit
def _normalised(z_ptr, offsets, inside, mu_ptr, rstd_ptr, token, HAS_NORM: tl.constexpr):
    """(zhat, 1/std) of a token's logits in fp32."""
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0
    if HAS_NORM:
        rstd = tl.load(rstd_ptr + token)
        z = (z - tl.load(mu_ptr + token)) * rstd
    return z, rstd


@triton.jit
def _forward_kernel(
    z_ptr, p_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, peak_ptr, total_ptr, factor_ptr, num_tokens, width,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_LSE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a block: z -> p, which may be in place.

    With HAS_LSE p is final, else relative to the running maximum `peak`, as is the running sum of p, `total`.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    vocab = tl.arange(0, BLOCK)
    inside = vocab < width
    gamma, beta = _affine(gamma_ptr, beta_ptr, vocab, inside, HAS_GAMMA, HAS_BETA)
    for token in tl.range(first, min(first + ROWS, num_tokens), num_stages=STAGES):
        offsets = token * width + vocab
        zhat, _ = _normalised(z_ptr, offsets, inside, mu_ptr, rstd_ptr, token, HAS_NORM)
        logits = tl.where(inside, zhat * gamma + beta, float("-inf"))
        if HAS_LSE:
            p = tl.exp(logits - tl.load(lse_ptr + token))
        else:
            before = tl.load(peak_ptr + token)
            highest = tl.maximum(tl.max(logits, axis=0), -1e30)  # a token masked everywhere must not turn into nan
            peak = tl.where(highest > before + _LAG, highest, before)
            p = tl.exp(logits - peak)
            factor = tl.exp(before - peak)
            tl.store(total_ptr + token, tl.load(total_ptr + token) * factor + tl.sum(p, axis=0))
            tl.store(factor_ptr + token, factor)
            tl.store(peak_ptr + token, peak)
        tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "tile_tokens"])
def _backward_kernel(
    z_ptr, dp_ptr, p_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    g_part_ptr, gamma_grad_ptr, beta_grad_ptr, num_tokens, width, tile_tokens,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    STORE_P: tl.constexpr, TOKEN_SUMS: tl.constexpr, AFFINE_SUMS: tl.constexpr,
    TILE_VOCAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile, token by token: z -> p and dp -> gamma p (dp - delta) / std, with partial sums over both dimensions."""
    tile_token, tile_vocab = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    vocab = tile_vocab * TILE_VOCAB + tl.arange(0, TILE_VOCAB)
    inside = vocab < width
    gamma, beta = _affine(gamma_ptr, beta_ptr, vocab, inside, HAS_GAMMA, HAS_BETA)
    sum_gamma = tl.zeros([TILE_VOCAB], tl.float32)
    sum_beta = tl.zeros([TILE_VOCAB], tl.float32)
    first = tile_token * tile_tokens
    for token in tl.range(first, min(first + tile_tokens, num_tokens), num_stages=STAGES):
        offsets = token * width + vocab
        zhat, rstd = _normalised(z_ptr, offsets, inside, mu_ptr, rstd_ptr, token, HAS_NORM)
        dp = tl.load(dp_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        lse, delta = tl.load(lse_ptr + token), tl.load(delta_ptr + token)
        p = tl.where(inside, tl.exp(zhat * gamma + beta - lse), 0.0)
        ds = p * (dp - delta)
        g = (ds * gamma * rstd).to(dp_ptr.dtype.element_ty)
        if STORE_P:
            tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + offsets, g, mask=inside)
        if TOKEN_SUMS:  # of what the products get: dh then is a sum of rounded g times (W2's row - its mean row)
            g_part = g_part_ptr + tile_vocab * num_tokens + token
            tl.store(g_part, tl.load(g_part) + tl.sum(g.to(tl.float32), axis=0))
        if AFFINE_SUMS:
            if HAS_GAMMA:
                sum_gamma += ds * zhat
            if HAS_BETA:
                sum_beta += ds
    if AFFINE_SUMS:
        partial = tile_token * width + vocab
        if HAS_GAMMA:
            tl.store(gamma_grad_ptr + partial, sum_gamma, mask=inside)
        if HAS_BETA:
            tl.store(beta_grad_ptr + partial, sum_beta, mask=inside)


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


class TritonRows:
    """The sweep's row implementation on raw logits: `left` is h itself, 1/std is applied inside the kernels."""

    num_buffers = 1

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
        _rescale_kernel[(acc.shape[0], triton.cdiv(width, block))](acc, factor, width, BLOCK=block, **_OPTIONS)

    def hidden_gradient(self, acc: Tensor) -> Tensor:
        """1/std is already inside."""
        return acc

    def token_parts(self, block_size: int) -> Tensor:
        """Sums [T, N] of g / std over the vocabulary in T parts, each of which adds up one tile of every block."""
        num_parts, num_tokens = triton.cdiv(block_size, _TILE_VOCAB), self.left.shape[0]
        return torch.zeros(num_parts, num_tokens, dtype=torch.float32, device=self.left.device)

    def _flags(self, affine: VocabAffine) -> dict[str, bool]:
        return {
            "HAS_NORM": self.mu is not None,
            "HAS_GAMMA": affine.gamma is not None,
            "HAS_BETA": affine.beta is not None,
        }

    def forward(self, z: Tensor, affine: VocabAffine, peak: Tensor, total: Tensor, out: Tensor) -> Tensor:
        """As in TorchRows; `peak` may lag behind the true maximum by a constant."""
        factor = torch.empty_like(peak)
        self._run_forward(z, affine, out, None, peak, total, factor)
        return factor

    def probabilities(self, z: Tensor, affine: VocabAffine, lse: Tensor, out: Tensor) -> Tensor:
        """As in TorchRows."""
        self._run_forward(z, affine, out, lse, None, None, None)
        return out

    def _run_forward(self, z: Tensor, affine: VocabAffine, out: Tensor, *per_token: Tensor | None) -> None:
        """`per_token`: lse, or peak, total and factor."""
        num_tokens, width = z.shape
        block = triton.next_power_of_2(width)
        rows = _rows_per_program(block)
        _forward_kernel[(triton.cdiv(num_tokens, rows),)](
            z, out, self.mu, self.rstd, affine.gamma, affine.beta, *per_token, num_tokens, width,
            **self._flags(affine), HAS_LSE=per_token[0] is not None, ROWS=rows, STAGES=_STAGES, BLOCK=block,
            **_OPTIONS,
        )  # fmt: skip

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
        """As in TorchRows, except that the returned gradient already contains 1/std."""
        num_tokens, width = z.shape
        (p,) = buffers
        num_tiles = triton.cdiv(width, _TILE_VOCAB)
        tile_tokens = _tile_tokens(num_tokens, num_tiles, z.device)
        tiles = (triton.cdiv(num_tokens, tile_tokens), num_tiles)
        affine_parts = [
            lse.new_empty(tiles[0], width) if affine_sums and part is not None else None
            for part in (affine.gamma, affine.beta)
        ]
        _backward_kernel[tiles](
            z, dp, p, self.mu, self.rstd, affine.gamma, affine.beta, lse, delta,
            token_parts, *affine_parts, num_tokens, width, tile_tokens,
            **self._flags(affine), STORE_P=store_p, TOKEN_SUMS=token_parts is not None, AFFINE_SUMS=affine_sums,
            TILE_VOCAB=_TILE_VOCAB, STAGES=_STAGES,
            **_OPTIONS,
        )  # fmt: skip
        return p, dp, AffineSums(*(None if part is None else part.sum(dim=0) for part in affine_parts))

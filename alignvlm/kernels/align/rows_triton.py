"""The element-wise part of the operator as Triton row kernels: one read and one write of each block of logits.

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

from alignvlm.kernels.align.moments import RowStatistics
from alignvlm.kernels.align.vectors import ColumnGradients, Columns

# Fixed, so that partial sums have the same order whatever the autotuner picks inside a tile.
_TILE_ROWS = 128
_TILE_COLUMNS = 512
_STEP_ROWS = 4
_FIXED = {"num_warps": 8, "num_stages": 2}

# A running maximum may lag behind the true one by this much: exp(8) is harmless in bf16 and in fp32, and in return the
# [N, D] accumulator is rescaled in the first blocks only.
_LAG = tl.constexpr(8.0)


@triton.jit
def _logits(
    z, gamma_ptr, beta_ptr, columns, inside, mu, rstd,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """z [..., C] in fp32 -> (zhat, gamma zhat + beta, gamma)."""
    gamma = tl.full(columns.shape, 1.0, tl.float32)
    if HAS_NORM:
        z = (z - mu) * rstd
    logits = z
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + columns, mask=inside, other=0.0)
        logits = logits * gamma
    if HAS_BETA:
        logits += tl.load(beta_ptr + columns, mask=inside, other=0.0)
    return z, logits, gamma


@triton.jit
def _forward_kernel(
    z_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, peak_ptr, mass_ptr, factor_ptr, width,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a block: z -> p in place. With HAS_LSE p is final, else relative to the running maximum `peak`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    z = tl.load(z_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    mu, rstd = 0.0, 1.0
    if HAS_NORM:
        mu, rstd = tl.load(mu_ptr + row), tl.load(rstd_ptr + row)
    _, logits, _ = _logits(z, gamma_ptr, beta_ptr, columns, inside, mu, rstd, HAS_NORM, HAS_GAMMA, HAS_BETA)
    logits = tl.where(inside, logits, float("-inf"))
    if HAS_LSE:
        p = tl.exp(logits - tl.load(lse_ptr + row))
    else:
        before = tl.load(peak_ptr + row)
        highest = tl.maximum(tl.max(logits, axis=0), -1e30)  # a fully masked row must not turn into nan
        peak = tl.where(highest > before + _LAG, highest, before)
        p = tl.exp(logits - peak)
        tl.store(mass_ptr + row, tl.sum(p, axis=0))
        tl.store(factor_ptr + row, tl.exp(before - peak))
        tl.store(peak_ptr + row, peak)
    tl.store(z_ptr + row * width + columns, p.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    z_ptr, dp_ptr, mu_ptr, rstd_ptr, gamma_ptr, beta_ptr, lse_ptr, delta_ptr,
    row_ptr, row_product_ptr, gamma_grad_ptr, beta_grad_ptr, num_rows, width,
    HAS_NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    STORE_P: tl.constexpr, COLUMN_SUMS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile: z -> p and dp -> gamma p (dp - delta) / std in place, with partial sums over its rows and columns."""
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    columns = tile_column * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    inside_columns = columns < width
    sum_gamma = tl.zeros([STEP_ROWS, TILE_COLUMNS], tl.float32)
    sum_beta = tl.zeros([STEP_ROWS, TILE_COLUMNS], tl.float32)
    for start in range(0, TILE_ROWS, STEP_ROWS):
        rows = tile_row * TILE_ROWS + start + tl.arange(0, STEP_ROWS)[:, None]
        inside_rows = rows < num_rows
        inside = inside_rows & inside_columns
        offsets = rows.to(tl.int64) * width + columns
        z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dp = tl.load(dp_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + rows, mask=inside_rows, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=inside_rows, other=0.0)
        mu, rstd = 0.0, 1.0
        if HAS_NORM:
            mu = tl.load(mu_ptr + rows, mask=inside_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=inside_rows, other=0.0)
        zhat, logits, gamma = _logits(
            z, gamma_ptr, beta_ptr, columns, inside_columns, mu, rstd, HAS_NORM, HAS_GAMMA, HAS_BETA
        )
        p = tl.where(inside, tl.exp(logits - lse), 0.0)
        ds = p * (dp - delta)
        g = ds * gamma
        scaled = g * rstd
        if STORE_P:
            tl.store(z_ptr + offsets, p.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + offsets, scaled.to(dp_ptr.dtype.element_ty), mask=inside)
        if HAS_NORM:
            partial = tile_column.to(tl.int64) * num_rows + rows
            tl.store(row_ptr + partial, tl.sum(g, axis=1)[:, None], mask=inside_rows)
            tl.store(row_product_ptr + partial, tl.sum(g * zhat, axis=1)[:, None], mask=inside_rows)
        if COLUMN_SUMS:
            if HAS_GAMMA:
                sum_gamma += ds * zhat
            if HAS_BETA:
                sum_beta += ds
    if COLUMN_SUMS:
        partial = tile_row.to(tl.int64) * width + columns
        if HAS_GAMMA:
            tl.store(gamma_grad_ptr + partial, tl.sum(sum_gamma, axis=0)[None, :], mask=inside_columns)
        if HAS_BETA:
            tl.store(beta_grad_ptr + partial, tl.sum(sum_beta, axis=0)[None, :], mask=inside_columns)


@triton.jit
def _rescale_kernel(acc_ptr, factor_ptr, width, BLOCK: tl.constexpr):
    """acc[row] *= factor[row], without touching rows whose factor is 1 (nearly all after the first block)."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor != 1.0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        acc = tl.load(acc_ptr + row * width + columns, mask=inside, other=0.0)
        # The first factor is exp(-inf) = 0: the accumulator holds zeros then.
        tl.store(acc_ptr + row * width + columns, acc * factor, mask=inside)


@functools.cache
def _tuned(kernel: Any, key: tuple[str, ...], restore: tuple[str, ...], steps: tuple[int, ...] = ()) -> Any:
    """The kernel with autotuning; what it overwrites is restored between trials. Needs a GPU."""
    extra = [{"STEP_ROWS": step} for step in steps] or [{}]
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

    def __init__(self, h: Tensor, statistics: RowStatistics | None) -> None:
        self.left = h.contiguous()
        self.mu = None if statistics is None else statistics.mu
        self.rstd = None if statistics is None else statistics.rstd

    def operand(self, rows: Tensor) -> Tensor:
        """Blocks enter the matrix products as they are."""
        return rows

    def rescale(self, acc: Tensor, factor: Tensor) -> None:
        """`acc *= factor` per row, skipping rows whose factor is 1."""
        width = acc.shape[1]
        block = min(triton.next_power_of_2(width), 1024)
        _rescale_kernel[(acc.shape[0], triton.cdiv(width, block))](acc, factor, width, BLOCK=block)

    def hidden_gradient(self, acc: Tensor) -> Tensor:
        """1/std is already inside."""
        return acc

    def _flags(self, columns: Columns) -> dict[str, bool]:
        return {
            "HAS_NORM": self.mu is not None,
            "HAS_GAMMA": columns.gamma is not None,
            "HAS_BETA": columns.beta is not None,
        }

    def forward(self, z: Tensor, columns: Columns, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in TorchRows; `peak` may lag behind the true maximum by a constant."""
        mass, factor = torch.empty_like(peak), torch.empty_like(peak)
        self._run_forward(z, columns, None, peak, mass, factor)
        return z, mass, factor

    def probabilities(self, z: Tensor, columns: Columns, lse: Tensor) -> Tensor:
        """As in TorchRows."""
        self._run_forward(z, columns, lse, None, None, None)
        return z

    def _run_forward(
        self,
        z: Tensor,
        columns: Columns,
        lse: Tensor | None,
        peak: Tensor | None,
        mass: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        num_rows, width = z.shape
        arguments = (
            z, self.mu, self.rstd, columns.gamma, columns.beta, lse, peak, mass, factor, width,
        )  # fmt: skip
        flags = {**self._flags(columns), "HAS_LSE": lse is not None, "BLOCK": triton.next_power_of_2(width)}
        if _autotunes(z):
            restore = ("z_ptr",) if peak is None else ("z_ptr", "peak_ptr")
            _tuned(_forward_kernel, ("width",), restore)[(num_rows,)](*arguments, **flags)
        else:
            _forward_kernel[(num_rows,)](*arguments, **flags, **_FIXED)

    def backward(
        self,
        z: Tensor,
        dp: Tensor,
        columns: Columns,
        lse: Tensor,
        delta: Tensor,
        scratch: list[Tensor],
        *,
        store_p: bool,
        column_sums: bool,
    ) -> tuple[Tensor, Tensor, ColumnGradients]:
        """As in TorchRows, except that the returned gradient already contains 1/std; `scratch` is not needed."""
        del scratch
        num_rows, width = z.shape
        tiles = (triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(width, _TILE_COLUMNS))
        sums = ColumnGradients()
        row_parts = [lse.new_empty(tiles[1], num_rows) if self.mu is not None else None for _ in range(2)]
        column_parts = [
            lse.new_empty(tiles[0], width) if column_sums and part is not None else None
            for part in (columns.gamma, columns.beta)
        ]
        arguments = (
            z, dp, self.mu, self.rstd, columns.gamma, columns.beta, lse, delta,
            *row_parts, *column_parts, num_rows, width,
        )  # fmt: skip
        flags = {
            **self._flags(columns),
            "STORE_P": store_p,
            "COLUMN_SUMS": column_sums,
            "TILE_ROWS": _TILE_ROWS,
            "TILE_COLUMNS": _TILE_COLUMNS,
        }
        if _autotunes(z):
            kernel = _tuned(_backward_kernel, ("width", "STORE_P", "COLUMN_SUMS"), ("z_ptr", "dp_ptr"), (2, 4, 8))
            kernel[tiles](*arguments, **flags)
        else:
            _backward_kernel[tiles](*arguments, **flags, STEP_ROWS=_STEP_ROWS, **_FIXED)
        sums.row, sums.row_product = (None if part is None else part.sum(dim=0) for part in row_parts)
        sums.gamma, sums.beta = (None if part is None else part.sum(dim=0) for part in column_parts)
        return z, dp, sums

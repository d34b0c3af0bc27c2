"""Matrix products with a chosen accumulator: low-precision operands, fp32 sums, no hidden copies. Nothing else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums of `dtype` values are kept in: float64 stays, everything else is fp32."""
    return torch.promote_types(dtype, torch.float32)


def accumulate(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """`acc += a @ b` in place; `acc` may be fp32 while `a` [M, K] and `b` [K, P] are bf16 or fp16."""
    if acc.dtype == a.dtype:
        acc.addmm_(a, b)
    elif a.is_cuda and _adds_into_fp32(a.device, a.dtype):
        torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    else:
        acc.add_(product(a, b))


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with the sums, and the result, in the wide dtype."""
    wide = wide_dtype(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a @ b`, rounded once to the dtype of `out`."""
    if out.dtype == a.dtype and (a.is_cuda or a.dtype == wide_dtype(a.dtype)):
        torch.mm(a, b, out=out)
    else:
        out.copy_(product(a, b))


def product_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` for a [M, K], b [P, K] and bias [P] of one dtype.

    In fp32 on a CPU by oneDNN, where this PyTorch has it, else, and everywhere else, by PyTorch's own product.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() and _has_onednn():
        return _onednn_product_nt(a, b, bias)
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def _has_onednn() -> bool:
    """Whether oneDNN's convolution can be called; `torch.backends.mkldnn.flags(enabled=False)` switches it off.

    It cannot in code that is compiled: there it meets tensors without numbers, which it does not know.
    """
    backend = torch.backends.mkldnn
    if torch.compiler.is_compiling():
        return False
    return hasattr(torch, "mkldnn_convolution") and backend.is_available() and bool(backend.enabled)


def _onednn_product_nt(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product as a convolution with a kernel of 1 x 1 over M pixels, since `linear` of fp32 calls MKL instead.

    `torch.mkldnn_convolution` is an undocumented operator of ATen. Its time over that of `addmm`, with torch 2.13 on an
    AMD EPYC with AVX-512, one thread and two, for [M, K] x [P, K]: 0.94 and 0.93 at 2048 x 384, K = 576; 0.87 and 0.90
    at 4096 x 192, K = 576; 0.91 and 0.94 at 2048 x 384, K = 2048; 0.96 and 0.99 at 1024 x 384, K = 256. A product of
    500 x 70, K = 48, takes 0.03 ms more. Delete this function when the medians come within 3 % of 1.
    """
    pixels = a.contiguous().view(1, a.shape[0], 1, a.shape[1]).permute(0, 3, 1, 2)
    kernel = b.contiguous().view(b.shape[0], 1, 1, b.shape[1]).permute(0, 3, 1, 2)
    result = torch.mkldnn_convolution(pixels, kernel, bias, (0, 0), (1, 1), (1, 1), 1)
    return result.permute(0, 2, 3, 1).reshape(a.shape[0], b.shape[0])


def product_with_wide(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for a wide `b` and an `a` of any dtype, in the wide dtype, on tensor cores where `a` is 16 bit.

    A wide b is the sum of a high and a low part in the dtype of `a` (16 mantissa bits together in bf16), so two cheap
    products replace one in fp32.
    """
    if a.dtype == b.dtype:
        return a @ b
    if not a.is_cuda:
        return a.to(b.dtype) @ b
    high = b.to(a.dtype)
    result = product(a, high)
    accumulate(result, a, (b - high).to(a.dtype))
    return result


@functools.cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch takes an fp32 addend for 16-bit operands (the first versions with `out_dtype` did not)."""
    acc = torch.zeros(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(acc, ones, ones, out_dtype=torch.float32, out=acc)
    except RuntimeError:
        return False
    return True

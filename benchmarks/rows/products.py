"""The small products of the ALIGN operator in the forms to choose from, and a kernel with two of the large ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from rows.blocks import Block, Candidate, backward, timed
from rows.candidates import backward_fused, correct_in_fp32, gram_in_tiles
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from alignvlm.kernels.align import vocab_moments
from alignvlm.kernels.align.moments import add_weight_gradient
from alignvlm.kernels.align.vocab_blocks import default_block
from alignvlm.kernels.matmul import accumulate, product

FUSED_TILES = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3))
"""Tokens, vocabulary, depth, warps, stages."""


def products(num_tokens: int, vocab: int, width: int, device: str, dtype: torch.dtype) -> dict[str, float | str]:
    """ms of the operator's small products in the forms to choose from."""
    generator = torch.Generator(device).manual_seed(0)

    def values(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    h, w2, grad_w2 = values(num_tokens, width), values(vocab, width) * 0.02, values(vocab, width)
    moments = vocab_moments(w2)
    found: dict[str, float | str] = {}

    def measure(name: str, run: Callable[[], Any]) -> None:
        try:
            found[name] = timed(run, device)
            print(f"{name:70}{found[name]:8.3f} ms")
        except RuntimeError as problem:
            found[name] = str(problem).splitlines()[0][:160]
            print(f"{name:70}  {found[name]}")

    measure("moments of W2, as now", lambda: vocab_moments(w2))
    gram, row = moments.covariance.clone(), moments.mean.clone()
    measure("moments: W2^T W2 in tiles, as before", lambda: gram_in_tiles(w2, gram))
    measure("moments: W2^T W2 as one product with fp32 sums", lambda: product(w2.T, w2))
    measure("moments: mean row, one sum in fp32", lambda: w2.sum(dim=0, dtype=torch.float32))
    measure("moments: mean row as a product of ones", lambda: product(w2.new_ones(1, vocab), w2))
    gram = product(w2.T, w2).div_(vocab).addr_(moments.mean, moments.mean, alpha=-1)
    difference = float((gram - moments.covariance).abs().max() / moments.covariance.abs().max())
    print(f"{'moments: largest difference of the two forms':70}{difference:8.0e}")
    found["moments: largest difference of the two forms"] = difference

    zeros = moments.mean.new_zeros(num_tokens)
    measure("dW2 correction, as now", lambda: add_weight_gradient(grad_w2, h, w2, moments, zeros, zeros))
    second = values(width, width)
    measure("dW2 correction: fp32 by blocks, as before", lambda: correct_in_fp32(grad_w2, w2, second, row))
    measure("dW2 correction: addmm_ in place", lambda: grad_w2.addmm_(w2, second))
    measure("dW2 correction: the row, add_ in place", lambda: grad_w2.add_(row))
    ones, rows = w2.new_ones(vocab, 16), values(16, width)
    measure("dW2 correction: the row as a product of depth 16", lambda: grad_w2.addmm_(ones, rows))
    measure("dW2 correction: S = weighted h^T h", lambda: product((h * h[:, :1]).T, h))

    for size in dict.fromkeys((default_block(num_tokens, vocab, dtype, torch.device("cuda")), 8192)):
        size = min(size, vocab)
        p, e = values(num_tokens, size), w2[:size]
        acc = torch.zeros(num_tokens, width, device=device)
        at = f"[N, {size}] x [{size}, D]"
        measure(f"{at}: rounded to the dtype", lambda p=p, e=e: torch.mm(p, e))
        measure(f"{at}: fp32 sums", lambda p=p, e=e: product(p, e))
        measure(f"{at}: accumulated in fp32, as now", lambda p=p, e=e, acc=acc: accumulate(acc, p, e))
        measure(f"{at}: fp32 sums, then add_", lambda p=p, e=e, acc=acc: acc.add_(product(p, e)))
        measure(f"[N, D] x [D, {size}]: logits", lambda e=e: torch.mm(h, e.T))
        measure(f"[{size}, N] x [N, D]: dW2", lambda p=p: torch.mm(p.T, h))
    return found


def fused(num_tokens: int, width: int, hidden: int, device: str, dtype: torch.dtype, stop: float) -> list:
    """The backward of a block with the two products before it: one kernel against three."""
    block = Block(num_tokens, width, device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    h, upstream, w2, e = (
        (torch.randn(size, hidden, generator=generator, device=device) / hidden**0.25).to(dtype)
        for size in (num_tokens, num_tokens, width, width)
    )
    logits = (torch.mm(h, w2.T).float() - block.mu[:, None]) * block.rstd[:, None] * block.gamma + block.beta
    block.lse = logits.logsumexp(dim=1)
    del logits
    separate = Candidate("backward", {"TILE_TOKENS": 128, "TILE_VOCAB": 1024, "STAGES": 3}, 4, backward, backward=True)

    def three(target: Block) -> None:
        torch.mm(h, w2.T, out=target.z)
        torch.mm(upstream, e.T, out=target.dp)
        backward(target, separate)

    exact, found = block.fresh(), block.fresh()
    rows: list[dict[str, Any]] = [{"kernel": "two products, then backward", "ms": timed(lambda: three(exact), device)}]
    print(f"{'two products, then the row kernel':70}{rows[0]['ms']:8.3f} ms")
    for bm, bn, bk, warps, stages in FUSED_TILES if device == "cuda" else ((16, 16, 16, 4, 1),):
        if time.perf_counter() > stop:
            break
        grid = (triton.cdiv(num_tokens, bm), triton.cdiv(width, bn))
        sums = [block.mu.new_empty(shape) for shape in ((grid[1], num_tokens), (grid[0], width), (grid[0], width))]
        tiles = [
            TensorDescriptor.from_tensor(t, [size, columns]) for t, size, columns in (
                (h, bm, bk), (w2, bn, bk), (upstream, bm, bk), (e, bn, bk), (found.z, bm, bn), (found.dp, bm, bn))
        ]  # fmt: skip
        arguments = (
            *tiles, block.mu, block.rstd, block.gamma, block.beta, block.lse, block.delta, *sums,
            num_tokens, width, hidden, bm, bn, bk, 8,
        )  # fmt: skip
        launch = backward_fused[(grid[0] * grid[1],)]
        run = partial(launch, *arguments, num_warps=warps, num_stages=stages)
        row: dict[str, Any] = {"kernel": "backward fused", "tile": [bm, bn, bk], "stages": stages, "warps": warps}
        name = f"backward fused   tile {bm} x {bn} x {bk}, stages {stages}, warps {warps}"
        try:
            row["ms"] = timed(run, device)
            pairs = ((found.z, exact.z), (found.dp, exact.dp))
            row["error"] = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
            print(f"{name:70}{row['ms']:8.3f} ms   difference {row['error']:.0e}")
        except Exception as problem:
            if device == "cpu":
                raise
            row["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            print(f"{name:70} {row['failed']}")
        rows.append(row)
    return rows

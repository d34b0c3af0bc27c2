"""The parts of the ALIGN operator one by one: row kernels in several configurations, and its small products.

    python benchmarks/row_kernels.py            on a GPU, in under a minute
    python benchmarks/row_kernels.py --tiny     the same code in Triton's interpreter

Every configuration is checked against the plain form and then timed without its compilation: ms for one block of
logits, GB/s, and the fraction of what a device copy reaches in the same run. Results are written as they come to
benchmarks/results/row_kernels.json; with --tiny nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import torch
import triton
from _common import write
from _row_candidates import backward_before, backward_steps, forward_before
from torch import Tensor

from alignvlm.kernels.align import rows_triton, vocab_moments
from alignvlm.kernels.align.common import VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics, add_weight_gradient
from alignvlm.kernels.align.rows_torch import TorchRows
from alignvlm.kernels.align.vocab_blocks import default_block
from alignvlm.kernels.matmul import accumulate, product

CHECKED = 208
"""Tokens of the problem on which a configuration is compared with the plain form; a multiple of 16 like the others."""
TRIALS, LAUNCHES = 3, 12
LIMIT = 55.0
"""Seconds after which the sweep ends, wherever it is."""


class Block:
    """One block of logits [N, B] with all that the row kernels read."""

    def __init__(self, num_tokens: int, width: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def values(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.num_tokens, self.width = num_tokens, width
        self.z, self.dp = values(num_tokens, width).to(dtype), values(num_tokens, width).to(dtype)
        self.mu, self.rstd = 0.1 * values(num_tokens), 1 + 0.1 * values(num_tokens).abs()
        self.gamma, self.beta = 1 + 0.1 * values(width), 0.1 * values(width)
        self.delta = 0.1 * values(num_tokens)
        self.peak = torch.full_like(self.mu, -torch.inf)
        self.mass, self.factor = torch.empty_like(self.mu), torch.empty_like(self.mu)
        logits = (self.z.float() - self.mu[:, None]) * self.rstd[:, None] * self.gamma + self.beta
        self.lse = logits.logsumexp(dim=1)
        self.parts: dict[str, Tensor] = {}

    def fresh(self) -> Block:
        """The same with copies of what a kernel overwrites."""
        other = object.__new__(Block)
        other.__dict__ = dict(vars(self))
        other.z, other.dp, other.peak = self.z.clone(), self.dp.clone(), self.peak.clone()
        other.mass, other.factor = torch.empty_like(self.mu), torch.empty_like(self.mu)
        other.parts = {}
        return other


@dataclass(frozen=True)
class Candidate:
    kernel: str
    config: dict[str, int]
    warps: int
    launch: Callable[[Block, Candidate], None]
    backward: bool

    def __str__(self) -> str:
        values = ", ".join(f"{k.lower()} {v}" for k, v in self.config.items())
        return f"{self.kernel:16} {values}{', ' if values else ''}warps {self.warps}"


def forward_as_before(block: Block, c: Candidate) -> None:
    forward_before[(block.num_tokens,)](
        block.z, block.mu, block.rstd, block.gamma, block.beta, None, block.peak, block.mass, block.factor, block.width,
        HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True, HAS_LSE=False, BLOCK=triton.next_power_of_2(block.width),
        num_warps=c.warps,
    )  # fmt: skip


def forward(block: Block, c: Candidate) -> None:
    rows_triton._forward_kernel[(triton.cdiv(block.num_tokens, c.config["ROWS"]),)](
        block.z, block.z, block.mu, block.rstd, block.gamma, block.beta, None, block.peak, block.mass, block.factor,
        block.num_tokens, block.width, HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True, HAS_LSE=False,
        BLOCK=triton.next_power_of_2(block.width), **c.config, num_warps=c.warps,
    )  # fmt: skip


def parts(block: Block, c: Candidate, *names: str) -> tuple[tuple[int, int], list[Tensor]]:
    """(grid, buffers for partial sums): those of the affine parts [tiles, B], the others [tiles, N]."""
    tiles = (
        triton.cdiv(block.num_tokens, c.config["TILE_TOKENS"]),
        triton.cdiv(block.width, c.config["TILE_VOCAB"]),
    )
    for name in names:
        if name not in block.parts:
            shape = (tiles[0], block.width) if name in ("gamma", "beta") else (tiles[1], block.num_tokens)
            block.parts[name] = block.mu.new_empty(shape)
    return tiles, [block.parts[name] for name in names]


def backward_as_before(block: Block, c: Candidate) -> None:
    tiles, buffers = parts(block, c, "g_unscaled", "g_zhat", "gamma", "beta")
    backward_before[tiles](
        block.z, block.dp, block.mu, block.rstd, block.gamma, block.beta, block.lse, block.delta, *buffers,
        block.num_tokens, block.width, HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True, STORE_P=True, AFFINE_SUMS=True,
        **c.config, num_warps=c.warps,
    )  # fmt: skip


def backward(block: Block, c: Candidate) -> None:
    tiles, buffers = parts(block, c, "g", "gamma", "beta")
    rows_triton._backward_kernel[tiles](
        block.z, block.dp, block.z, block.mu, block.rstd, block.gamma, block.beta, block.lse, block.delta, *buffers,
        block.num_tokens, block.width, HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True,
        STORE_P=True, TOKEN_SUMS=True, AFFINE_SUMS=True, **c.config, num_warps=c.warps,
    )  # fmt: skip


def backward_in_steps(block: Block, c: Candidate) -> None:
    tiles, buffers = parts(block, c, "g", "gamma", "beta")
    backward_steps[tiles](
        block.z, block.dp, block.mu, block.rstd, block.gamma, block.beta, block.lse, block.delta, *buffers,
        block.num_tokens, block.width, **c.config, num_warps=c.warps,
    )  # fmt: skip


def forward_candidates() -> Iterator[Candidate]:
    for warps in (8, 16, 4):
        yield Candidate("forward before", {}, warps, forward_as_before, backward=False)
    for rows, stages, warps in (
        (1, 1, 8), (4, 1, 8), (4, 2, 8), (8, 2, 8), (8, 3, 8), (16, 2, 8), (16, 3, 8), (32, 3, 8),
        (4, 2, 16), (8, 2, 16), (16, 2, 16), (16, 3, 16), (8, 3, 4),
    ):  # fmt: skip
        config = {"ROWS": rows, "STAGES": stages}
        yield Candidate("forward", config, warps, forward, backward=False)


def backward_candidates() -> Iterator[Candidate]:
    for step, warps in ((4, 8), (2, 8), (4, 4)):
        config = {"TILE_TOKENS": 128, "TILE_VOCAB": 512, "STEP_TOKENS": step}
        yield Candidate("backward before", config, warps, backward_as_before, backward=True)
    for tokens, vocab, stages, warps in (
        (128, 1024, 3, 4), (128, 2048, 3, 8), (128, 1024, 1, 4), (128, 1024, 2, 4), (128, 1024, 4, 4),
        (64, 1024, 3, 4), (256, 1024, 3, 4), (128, 2048, 2, 8), (128, 2048, 4, 8), (256, 2048, 3, 8),
        (128, 2048, 3, 4), (128, 512, 4, 2), (128, 4096, 3, 8), (128, 4096, 2, 16), (128, 1024, 3, 8),
    ):  # fmt: skip
        config = {"TILE_TOKENS": tokens, "TILE_VOCAB": vocab, "STAGES": stages}
        yield Candidate("backward", config, warps, backward, backward=True)
    for vocab, step, stages, warps in ((1024, 4, 2, 4), (2048, 4, 2, 8), (2048, 2, 3, 8), (1024, 2, 3, 4)):
        config = {"TILE_TOKENS": 128, "TILE_VOCAB": vocab, "STEP": step, "STAGES": stages}
        yield Candidate("backward in steps", config, warps, backward_in_steps, backward=True)


def timed(run: Callable[[], Any], device: str) -> float:
    """ms of one call: the best of a few trials of several launches."""
    run()
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    best = float("inf")
    for _ in range(TRIALS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(LAUNCHES):
            run()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / LAUNCHES)
    return best


def error(c: Candidate, block: Block) -> float:
    """Largest difference from the plain form in fp32, each result against its largest value."""
    found, exact = block.fresh(), block.fresh()
    c.launch(found, c)
    # TorchRows subtracts mu / std from logits that are multiplied by 1/std already.
    plain = TorchRows(block.mu[:, None], LogitStatistics(block.mu, block.rstd))
    z, affine = block.z.float() * block.rstd[:, None], VocabAffine(block.gamma, block.beta)
    if not c.backward:
        p = torch.empty_like(z)
        mass, _ = plain.forward(z, affine, exact.peak, out=p)
        factor = torch.exp(exact.peak - found.peak)  # the peak of a kernel may lag behind
        pairs = [(found.z, p * factor[:, None]), (found.mass, mass * factor)]
    else:
        p, g, sums = plain.backward(
            z, block.dp.float(), affine, block.lse, block.delta, [torch.empty_like(z) for _ in range(2)],
            store_p=True, token_sums=True, affine_sums=True,
        )  # fmt: skip
        pairs = [(found.z, p), (found.dp, g * block.rstd[:, None])]
        expected = {"g": sums.g, "g_unscaled": g.sum(dim=1), "gamma": sums.gamma, "beta": sums.beta}
        pairs += [(part.sum(dim=0), value) for n, part in found.parts.items() if (value := expected.get(n)) is not None]
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def sweep(candidates: Iterator[Candidate], block: Block, small: Block, copy: float, device: str, stop: float) -> list:
    rows = []
    for c in candidates:
        if time.perf_counter() > stop:
            print(f"{c!s:70} and those after it left out: the time is up")
            break
        row: dict[str, Any] = {"kernel": c.kernel, **c.config, "warps": c.warps, "width": block.width}
        try:
            row["error"] = error(c, small)
            work = block.fresh()
            row["ms"] = timed(lambda c=c, work=work: c.launch(work, c), device)
        except Exception as problem:  # a configuration may not fit the device: the others go on
            if device == "cpu":
                raise
            row["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            print(f"{c!s:70} {row['failed']}")
        else:
            gigabytes = (8 if c.backward else 4) / 2 * block.z.element_size() * block.z.numel() / 1e9
            row["gb_per_s"] = gigabytes / row["ms"] * 1e3
            row["of_copy"] = row["gb_per_s"] / copy
            print(
                f"{c!s:70}{row['ms']:8.3f} ms{row['gb_per_s']:8,.0f} GB/s{row['of_copy']:7.2f} of a copy"
                f"   error {row['error']:.0e}"
            )
        rows.append(row)
    return rows


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
    measure("moments: W2^T W2 as one product with fp32 sums", lambda: product(w2.T, w2))
    measure("moments: mean row, one sum in fp32", lambda: w2.sum(dim=0, dtype=torch.float32))
    measure("moments: mean row as a product of ones", lambda: product(w2.new_ones(1, vocab), w2))
    gram = product(w2.T, w2).div_(vocab).addr_(moments.mean, moments.mean, alpha=-1)
    difference = float((gram - moments.covariance).abs().max() / moments.covariance.abs().max())
    print(f"{'moments: largest difference of the two forms':70}{difference:8.0e}")
    found["moments: largest difference of the two forms"] = difference

    zeros = moments.mean.new_zeros(num_tokens)
    measure("dW2 correction, as now", lambda: add_weight_gradient(grad_w2, h, w2, moments, zeros, zeros))
    second, row = values(width, width), values(width)
    measure("dW2 correction: addmm_ in place", lambda: grad_w2.addmm_(w2, second))
    measure("dW2 correction: the row, add_ in place", lambda: grad_w2.add_(row))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=2048, help="width D of h, W2 and E")
    parser.add_argument("--tiny", action="store_true", help="a few numbers in Triton's interpreter")
    args = parser.parse_args()
    start = time.perf_counter()
    device = "cpu" if args.tiny else "cuda"
    num_tokens, vocab, hidden = (18, 600, 24) if args.tiny else (args.tokens, args.vocab, args.hidden)
    dtype = torch.bfloat16
    widths = [130] if args.tiny else [8192, default_block(num_tokens, vocab, dtype, torch.device("cuda"))]
    content: dict[str, Any] = {"tokens": num_tokens, "vocab": vocab, "hidden": hidden, "rows": []}

    def save() -> None:
        content["seconds"] = round(time.perf_counter() - start, 1)
        if not args.tiny:
            write("row_kernels", content, device)

    for width in dict.fromkeys(widths):
        block, small = Block(num_tokens, width, device, dtype), Block(min(CHECKED, num_tokens), width, device, dtype)
        target = torch.empty_like(block.z)
        copy = 2 * block.z.nbytes / 1e9 / timed(lambda a=target, b=block.z: a.copy_(b), device) * 1e3
        content[f"copy_gb_per_s_{width}"] = copy
        print(f"\nN={num_tokens:,}, a block of {width:,}: a device copy reaches {copy:,.0f} GB/s")
        for candidates in (backward_candidates(), forward_candidates()):
            if width != widths[0]:  # wider blocks: the fastest of the first width
                done = {k: v for k, v in content.items() if k == "rows"}["rows"]
                candidates = iter(fastest(list(candidates), done))
            elif args.tiny:
                candidates = iter([c for i, c in enumerate(candidates) if i % 4 == 0])
            content["rows"] += sweep(candidates, block, small, copy, device, start + LIMIT)
            save()
        if width == widths[0]:
            print(f"\nproducts at N={num_tokens:,}, V={vocab:,}, D={hidden:,}")
            content["products"] = products(num_tokens, vocab, hidden, device, dtype)
            save()
    print(f"\n{content['seconds']} s" + ("" if args.tiny else ", written: benchmarks/results/row_kernels.json"))


def fastest(candidates: list[Candidate], rows: list[dict[str, Any]], count: int = 4) -> list[Candidate]:
    """The `count` fastest of these by what has been measured."""

    def measured(c: Candidate) -> float:
        mine = {"kernel": c.kernel, **c.config, "warps": c.warps}
        return next((r["ms"] for r in rows if "ms" in r and r.items() >= mine.items()), float("inf"))

    return sorted(candidates, key=measured)[:count]


if __name__ == "__main__":
    main()

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import torch
import triton
from _common import timed, write
from rows.blocks import Block, Candidate, backward, forward
from rows.products import products

from alignvlm.kernels.align import rows_triton
from alignvlm.kernels.align.common import VocabAffine
from alignvlm.kernels.align.moments import LogitStatistics
from alignvlm.kernels.align.rows_torch import TorchRows
from alignvlm.kernels.align.vocab_blocks import default_block

CHECKED = 208
"""Tokens of the problem on which a configuration is compared with the plain form; a multiple of 16 like the others."""
LIMIT = 55.0
"""Seconds after which the sweep ends, wherever it is."""


def forward_candidates(block: Block) -> Iterator[Candidate]:
    ours = (rows_triton._rows_per_program(block.width), rows_triton._STAGES, rows_triton._OPTIONS["num_warps"])
    for rows, stages, warps in (
        ours, (1, 1, 8), (4, 1, 8), (4, 2, 8), (8, 2, 8), (8, 3, 8), (16, 2, 8), (16, 3, 8), (32, 3, 8), (64, 3, 8),
        (4, 2, 16), (16, 2, 16), (16, 3, 16), (32, 3, 16), (8, 3, 4),
    ):  # fmt: skip
        config = {"ROWS": rows, "STAGES": stages}
        yield Candidate("forward", config, warps, forward, backward=False)


def backward_candidates(block: Block) -> Iterator[Candidate]:
    vocab, stages, warps = rows_triton._TILE_VOCAB, rows_triton._STAGES, rows_triton._OPTIONS["num_warps"]
    tokens = rows_triton._tile_tokens(block.num_tokens, triton.cdiv(block.width, vocab), block.z.device)
    for tile_tokens, tile_vocab, num_stages, num_warps in (
        (tokens, vocab, stages, warps),
        (128, 1024, 3, 4), (128, 2048, 3, 8), (128, 1024, 1, 4), (128, 1024, 2, 4), (128, 1024, 4, 4),
        (64, 1024, 3, 4), (256, 1024, 3, 4), (128, 2048, 2, 8), (128, 2048, 4, 8), (64, 2048, 3, 8), (256, 2048, 3, 8),
        (128, 2048, 3, 4), (128, 512, 4, 2), (128, 4096, 3, 8), (128, 4096, 2, 16), (128, 1024, 3, 8),
    ):  # fmt: skip
        config = {"TILE_TOKENS": tile_tokens, "TILE_VOCAB": tile_vocab, "STAGES": num_stages}
        yield Candidate("backward", config, num_warps, backward, backward=True)


def error(c: Candidate, block: Block) -> float:
    """Largest difference from the plain form in fp32, each result against its largest value."""
    found, exact = block.fresh(), block.fresh()
    c.launch(found, c)
    # TorchRows subtracts mu / std from logits that are multiplied by 1/std already.
    plain = TorchRows(block.mu[:, None], LogitStatistics(block.mu, block.rstd))
    z, affine = block.z.float() * block.rstd[:, None], VocabAffine(block.gamma, block.beta)
    if not c.backward:
        p = torch.empty_like(z)
        plain.forward(z, affine, exact.peak, exact.total, out=p)
        factor = torch.exp(exact.peak - found.peak)  # the peak of a kernel may lag behind
        pairs = [(found.z, p * factor[:, None]), (found.total, exact.total * factor)]
    else:
        p, g, sums = plain.backward(
            z, block.dp.float(), affine, block.lse, block.delta, [torch.empty_like(z) for _ in range(2)],
            store_p=True, token_parts=(token_sums := torch.zeros_like(block.mu)[None]), affine_sums=True,
        )  # fmt: skip
        pairs = [(found.z, p), (found.dp, g * block.rstd[:, None])]
        expected = {"g": token_sums[0], "gamma": sums.gamma, "beta": sums.beta}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=17_496, help="24 tiles of 729 are the default")
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

    print(f"products at N={num_tokens:,}, V={vocab:,}, D={hidden:,}")
    content["products"] = products(num_tokens, vocab, hidden, device, dtype)
    save()
    for width in dict.fromkeys(widths):
        block, small = Block(num_tokens, width, device, dtype), Block(min(CHECKED, num_tokens), width, device, dtype)
        target = torch.empty_like(block.z)
        copy = 2 * block.z.nbytes / 1e9 / timed(lambda a=target, b=block.z: a.copy_(b), device) * 1e3
        content[f"copy_gb_per_s_{width}"] = copy
        print(f"\nN={num_tokens:,}, a block of {width:,}: a device copy reaches {copy:,.0f} GB/s")
        for candidates in (backward_candidates(block), forward_candidates(block)):
            if width != widths[0]:  # wider blocks: ours, and the fastest of the first width
                ours, *others = candidates
                candidates = iter([ours, *fastest(others, content["rows"])])
            elif args.tiny:
                candidates = iter([c for i, c in enumerate(candidates) if i % 4 == 0])
            content["rows"] += sweep(candidates, block, small, copy, device, start + LIMIT)
            save()
    print(f"\n{content['seconds']} s" + ("" if args.tiny else ", written: benchmarks/results/row_kernels.json"))


def fastest(candidates: list[Candidate], rows: list[dict[str, Any]]) -> list[Candidate]:
    """The three fastest of these by what has been measured."""

    def measured(c: Candidate) -> float:
        mine = {"kernel": c.kernel, **c.config, "warps": c.warps}
        return next((r["ms"] for r in rows if "ms" in r and r.items() >= mine.items()), float("inf"))

    return sorted(candidates, key=measured)[:3]


if __name__ == "__main__":
    main()

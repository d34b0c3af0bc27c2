"""Attention over packed documents: every implementation that runs here, against SDPA in fp32 and against the others.

    python benchmarks/attention.py           on a GPU, in under a minute
    python benchmarks/attention.py --tiny    the same code on a CPU

Values and gradients are compared on documents of mixed lengths, times taken on packs of the 1B and the 8B recipe:
medians of the forward pass and of both, and what they reach of the FLOPs that a causal mask leaves. Writes
benchmarks/results/attention-<device>.json after every measurement.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import timed, write
from torch import Tensor

from alignvlm.model.attention import PACKED, SDPA, Documents, choose_attention

NAMES = ("varlen", "sdpa", "flash", "flash4")
"""As `model.attention` of a recipe says them; the last compiles its kernels for seconds."""
MIXED = (1, 700, 64, 129, 2048, 3, 31)
LARGEST_ERROR = 1e-2
"""Of an implementation in bf16."""


@dataclass(frozen=True)
class Case:
    """Heads of a language model and the documents of a pack."""

    heads: int
    groups: int
    """Heads of keys and values."""
    head_dim: int
    lengths: tuple[int, ...]

    def tensors(self, lengths: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Query, key and value [1, heads, T, d] as a model lays them out, and the gradient of the output."""
        generator, total = torch.Generator(device).manual_seed(0), sum(lengths)

        def values(heads: int) -> Tensor:
            return torch.randn(1, total, heads, self.head_dim, generator=generator, device=device).bfloat16()

        return [values(count).transpose(1, 2) for count in (self.heads, self.groups, self.groups)], values(self.heads)

    def __str__(self) -> str:
        return f"{self.heads} and {self.groups} heads of {self.head_dim}, {len(self.lengths)} documents"

    @property
    def flops(self) -> float:
        """Of the forward pass: two products of half a square per document. The backward pass has five."""
        return 2.0 * self.heads * self.head_dim * sum(length**2 for length in self.lengths)


CASES = [
    Case(32, 8, 64, (2304,) * 8),
    Case(32, 8, 128, (2304,) * 8),
    Case(32, 8, 64, (1676,) * 11),
    Case(32, 8, 128, (6656,) * 4),
]
"""Packs of benchmarks/train.py: captions, long answers and documents; heads of the 1B and of the 8B model."""
SMALL = [Case(4, 2, 16, (9, 33, 1))]


class Attention:
    """One implementation on one layout of documents."""

    def __init__(self, implementation: str, lengths: tuple[int, ...], device: torch.device) -> None:
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.documents = Documents.of(ends, max(lengths), implementation).to(device)
        self._function = PACKED[implementation]

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """[1, T, H, d]"""
        scale = tensors[0].shape[-1] ** -0.5
        return self._function(None, *tensors, None, scaling=scale, documents=self.documents)[0]

    def gradients(self, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
        """The output, and the gradients of query, key and value."""
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = self(leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def errors(case: Case, implementation: str, lengths: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Norm of the difference from SDPA in fp32 over that of its result."""
    tensors, upstream = case.tensors(lengths, device)
    exact = Attention(SDPA, lengths, device).gradients([t.float() for t in tensors], upstream.float())
    found = Attention(implementation, lengths, device).gradients(tensors, upstream)
    names = ("out", "query", "key", "value")
    return {
        name: float((one.float() - other).norm() / other.norm())
        for name, one, other in zip(names, found, exact, strict=True)
    }


def measure(case: Case, name: str, device: torch.device, mixed: tuple[int, ...], row: dict[str, Any]) -> None:
    """Fill a row of the results; `failed` says why an implementation does not run here."""
    try:
        implementation = choose_attention(name, device, "bf16")
        row["errors"] = errors(case, implementation, mixed, device)
        tensors, upstream = case.tensors(case.lengths, device)
        attention = Attention(implementation, case.lengths, device)
        with torch.no_grad():
            row["forward_ms"] = timed(lambda: attention(tensors), device.type)
        row["total_ms"] = timed(lambda: attention.gradients(tensors, upstream), device.type)
    except Exception as error:  # the others are measured all the same
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    else:
        row["forward_tflops"] = case.flops / row["forward_ms"] / 1e9
        row["total_tflops"] = 3.5 * case.flops / row["total_ms"] / 1e9


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether an implementation that can run here has failed or computes something else, NaN included."""
    if "failed" in row:
        return not row["failed"].startswith("ValueError: model.attention")
    return not all(error <= LARGEST_ERROR for error in row["errors"].values())


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"][:110])
    return (
        f"forward {row['forward_ms']:7.3f} ms {row['forward_tflops']:6.0f} TFLOP/s, both "
        f"{row['total_ms']:7.3f} ms {row['total_tflops']:6.0f} TFLOP/s, largest error {max(row['errors'].values()):.1e}"
    )


def main() -> int:
    """Measure; 1 where an implementation that can run here fails or computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few numbers on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    rows: list[dict[str, Any]] = []
    code = 0
    for name in NAMES:
        print(f"\n{name}")
        for case in SMALL if arguments.tiny else CASES:
            rows.append({"attention": name, **asdict(case)})
            measure(case, name, device, case.lengths if arguments.tiny else MIXED, rows[-1])
            code = max(code, int(is_wrong(rows[-1])))
            print(f"{case!s:44}{line(rows[-1])}", flush=True)
            path = write(f"attention-{device.type}", {"rows": rows}, device.type)
    print(f"\nwritten: {path}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())

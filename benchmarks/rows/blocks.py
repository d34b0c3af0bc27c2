"""One block of logits with what the row kernels read, and how a kernel is launched and timed in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from alignvlm.kernels.align import rows_triton


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
        self.total, self.factor = torch.zeros_like(self.mu), torch.empty_like(self.mu)
        logits = (self.z.float() - self.mu[:, None]) * self.rstd[:, None] * self.gamma + self.beta
        self.lse = logits.logsumexp(dim=1)
        self.parts: dict[str, Tensor] = {}
        """Partial sums of the backward kernel: g / std [tiles, N], the gradients of gamma and beta [tiles, B]."""

    def fresh(self) -> Block:
        """The same with copies of what a kernel overwrites."""
        other = object.__new__(Block)
        other.__dict__ = dict(vars(self))
        other.z, other.dp, other.peak = self.z.clone(), self.dp.clone(), self.peak.clone()
        other.total, other.factor = torch.zeros_like(self.mu), torch.empty_like(self.mu)
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


def forward(block: Block, c: Candidate) -> None:
    rows_triton._forward_kernel[(triton.cdiv(block.num_tokens, c.config["ROWS"]),)](
        block.z, block.z, block.mu, block.rstd, block.gamma, block.beta, None, block.peak, block.total, block.factor,
        block.num_tokens, block.width, HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True, HAS_LSE=False,
        BLOCK=triton.next_power_of_2(block.width), **c.config, num_warps=c.warps,
    )  # fmt: skip


def backward(block: Block, c: Candidate) -> None:
    tile_tokens, tile_vocab = c.config["TILE_TOKENS"], c.config["TILE_VOCAB"]
    tiles = (triton.cdiv(block.num_tokens, tile_tokens), triton.cdiv(block.width, tile_vocab))
    if not block.parts:
        shapes = {"g": (tiles[1], block.num_tokens), "gamma": (tiles[0], block.width), "beta": (tiles[0], block.width)}
        block.parts = {name: block.mu.new_zeros(shape) for name, shape in shapes.items()}
    rows_triton._backward_kernel[tiles](
        block.z, block.dp, block.z, block.mu, block.rstd, block.gamma, block.beta, block.lse, block.delta,
        *block.parts.values(), block.num_tokens, block.width, tile_tokens,
        HAS_NORM=True, HAS_GAMMA=True, HAS_BETA=True, STORE_P=True, TOKEN_SUMS=True, AFFINE_SUMS=True,
        TILE_VOCAB=tile_vocab, STAGES=c.config["STAGES"], num_warps=c.warps,
    )  # fmt: skip

"""What Liger's fused layers save for the backward pass, on the meta device: for estimates, where no kernel runs.

Liger's RoPE saves what transformers' own does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from alignvlm.kernels.fused_layers import find_layers


def fuse_on_meta(model: nn.Module) -> None:
    """Let the layers of a model on the meta device save what `fuse_layers` would let them save."""

    def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight)

    def swiglu(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))

    found = find_layers(model)
    for kind, forward in (("RMSNorm", rms_norm), ("SwiGLU", swiglu)):
        for module in found[kind]:
            module.forward = MethodType(forward, module)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.empty_like(ctx.saved_tensors[1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

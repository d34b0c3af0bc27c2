"""Linear layers for ZeRO-3: their backward pass takes the weight from the parameter, not from a view of it.

PyTorch's own linear layer keeps a transposed view of its weight for the backward pass, and with it the gathered weights
of the whole model. DeepSpeed's replacement of `torch.nn.functional.linear` keeps the parameter, as this one does, but
adds a bias [D] to [B, T, D] in a pass of its own, and costs the host more per call (benchmarks/train.py measures both):
PyTorch looks at the signature of such a function whenever it is applied.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; x [..., d_in], W [d_out, d_in], b [d_out] or None. The caller computes y, which is empty here.

    What is saved goes to PyTorch's checkpointing when `forward` returns. A layer that is recomputed ends as soon as it
    has saved everything: before its last product, as it does with PyTorch's own linear layers, not behind it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The parameter itself: ZeRO-3 has gathered it again when backward comes. A frozen one needs no input.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        x_grad = (rows @ weight).view(*grad.shape[:-1], weight.shape[1]) if for_x else None
        weight_grad = rows.t() @ x.reshape(-1, x.shape[-1]) if for_weight else None
        return x_grad, weight_grad, rows.sum(0) if for_bias else None


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    y: Tensor = _Linear.apply(input, weight, bias)
    with torch.no_grad():
        rows, out = input.reshape(-1, input.shape[-1]), y.view(-1, y.shape[-1])
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
    return y


def keep_parameters(model: nn.Module) -> int:
    """Let the model's linear layers save their parameters for the backward pass; returns how many there are.

    Subclasses of `nn.Linear` stay as they are, since they may compute something else.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)

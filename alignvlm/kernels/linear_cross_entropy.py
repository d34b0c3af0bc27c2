"""Token loss of a language model straight from hidden states, without keeping any logits.

As Liger does, the gradients are computed in chunks of tokens already in the forward: the backward only scales them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from alignvlm.kernels.matmul import accumulate, product_into, wide_dtype

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int = 2048,
    implementation: Literal["torch", "liger"] = "torch",
    token_losses: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias` against `labels`: a scalar, fp32 (fp64 for fp64 inputs).

    Args:
        hidden: [N, D] last hidden states, already aligned with their labels (no shift happens here); N may be 0.
        weight: [V, D] LM head, same dtype as `hidden`. When frozen, its gradient is not computed.
        labels: [N] int64; -100 marks tokens without loss.
        bias: [V] or None.
        chunk: tokens whose logits exist at the same time (torch implementation).
        implementation: "liger" is Liger's kernel (CUDA, liger-kernel installed). It takes chunks of about N D / V
            tokens, each of which reads the whole head again: with few supervised tokens and a large vocabulary it moves
            many times the bytes of one chunk here.
        token_losses: [N] of the sum's dtype, filled with the cross entropy of every token, 0 where there is none; no
            gradient goes through it (torch implementation).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    _check(hidden, weight, labels, bias, chunk, token_losses)
    device_type = hidden.device.type
    if _is_autocast(hidden) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    with nullcontext() if hidden.is_meta else torch.autocast(device_type, enabled=False):
        if implementation == "liger":
            if token_losses is not None:
                raise ValueError("token_losses needs the torch implementation: Liger's kernel sums them")
            return _liger(hidden, weight, labels, bias)
        if implementation == "torch":
            if not torch.is_grad_enabled():
                return _loss_and_gradients(hidden, weight, labels, bias, chunk, (False, False, False), token_losses)[0]
            loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, bias, chunk, token_losses)
            return loss
    raise ValueError(f"implementation must be 'torch' or 'liger', not {implementation!r}")


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if hidden.shape[0] == 0:  # its kernels cannot be launched on an empty grid
        return hidden.float().sum() + 0.0 * weight.flatten()[:1].float().sum()
    loss = liger_fused_linear_cross_entropy(
        hidden, weight, labels, bias, ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )
    return loss.float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        chunk: int,
        token_losses: Tensor | None,
    ) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3])
        loss, *grads = _loss_and_gradients(hidden, weight, labels, bias, chunk, needs, token_losses)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, scaled[2], None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk: int,
    needs: tuple[bool, bool, bool],
    token_losses: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and, where `needs` says so, its gradients by hidden [N, D], weight [V, D] and bias [V]."""
    wide = wide_dtype(hidden.dtype)
    loss = hidden.new_zeros((), dtype=wide)
    # What no other chunk adds to is rounded once, to its own dtype: hidden's gradient, the head's of a single chunk.
    is_single = 0 < hidden.shape[0] <= chunk
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = (
        (torch.empty_like(weight) if is_single else torch.zeros_like(weight, dtype=wide)) if needs[1] else None
    )
    grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs[2] else None
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        h, target = hidden[rows], labels[rows]
        logits = torch.nn.functional.linear(h, weight, bias).to(wide)  # [chunk, V]
        lse = torch.logsumexp(logits, dim=-1)  # [chunk]
        counted = target != IGNORE_INDEX
        index = target.where(counted, 0).unsqueeze(1)
        each = torch.where(counted, lse - logits.gather(1, index).squeeze(1), 0.0)  # [chunk]
        loss += each.sum()
        if token_losses is not None:
            token_losses[rows] = each
        if any(needs):
            grad = logits.sub_(lse.unsqueeze(1)).exp_()  # probabilities [chunk, V]
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            grad.mul_(counted.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            narrow = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ weight
            if grad_weight is not None and is_single:
                product_into(grad_weight, narrow.T, h)
            elif grad_weight is not None:
                accumulate(grad_weight, narrow.T, h)
            del grad, narrow
        del logits  # what a chunk has made would else live until the next one has made the same
    return loss, grad_hidden, grad_weight, grad_bias


def _is_autocast(tensor: Tensor) -> bool:
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int, token_losses: Tensor | None
) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating point [N, D], not {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}] to fit hidden, not {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{hidden.shape[0]}], not {labels.dtype} {tuple(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], not {tuple(bias.shape)}")
    if token_losses is not None and token_losses.shape != labels.shape:
        raise ValueError(f"token_losses must be [{labels.shape[0]}], not {tuple(token_losses.shape)}")
    autocast = _is_autocast(hidden)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype and not autocast:
            raise ValueError(f"{name} is {tensor.dtype} but hidden is {hidden.dtype}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias), ("token_losses", token_losses)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if chunk < 1:
        raise ValueError(f"chunk must be positive, not {chunk}")


def next_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label of the next token in each place, int64 [B, T]; -100 where the token is the last of its document.

    Args:
        labels: int64 [B, T], -100 marks tokens without loss.
        cu_seqlens: [num_documents + 1], cumulative lengths of the documents in one row of labels.
    """
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    if cu_seqlens is not None:
        following[0, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return following


def find_targets(following: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [M] in the flattened labels of next tokens [B, T] that are supervised; these labels [M]."""
    following = following.flatten()
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]

"""LayerNorm over the vocabulary without a pass over N x V: mean and variance of a token's logits in closed form.

With the mean row w of W2 and the covariance C = (W2 - 1w)^T (W2 - 1w) / V (D x D), token n has mu = h.w and
var = h C h^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignvlm.kernels.matmul import product, product_with_wide, wide_dtype

_BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """First and second moments of the rows of W2, in fp32 (float64 for float64 weights).

    Computing them costs 2 V D^2 FLOPs; they can be reused as long as W2 does not change: `SharedMoments`.
    """

    mean: Tensor
    """[D] mean row of W2."""
    covariance: Tensor
    """[D, D] covariance of W2's rows."""
    constant: bool = False
    """True: numbers of their own (those of a vocabulary W2 was cut from), so no gradient reaches W2 through them."""

    def check(self, w2: Tensor) -> None:
        """Raise ValueError if they cannot belong to w2 [V, D]."""
        if self.covariance.shape != (w2.shape[1], w2.shape[1]):
            raise ValueError(f"moments belong to a width of {len(self.mean)}, but w2 is {tuple(w2.shape)}")
        if self.mean.device != w2.device:
            raise ValueError(f"moments are on {self.mean.device} but w2 is on {w2.device}")


@dataclass
class SharedMoments:
    """Moments of one W2, for as long as it does not change, as in gradient accumulation: computed when first needed.

    Whoever changes the weights makes another one: version counters of tensors do not show what ZeRO's optimizers do.
    """

    _kept: Moments | None = None

    def of(self, w2: Tensor) -> Moments:
        """The moments of w2 [V, D]. Raises ValueError when those kept belong to another width or device."""
        if self._kept is None:
            self._kept = vocab_moments(w2)
        self._kept.check(w2)
        return self._kept


def moments_pay_off(num_tokens: int, width: int) -> bool:
    """Whether W2's moments (4/3 V D^2) are less work than sweeping the logits of so many tokens (2 N V D)."""
    return num_tokens > 0.67 * width


@torch.no_grad()
def vocab_moments(w2: Tensor) -> Moments:
    """Moments of W2 [V, D], summed in fp32 (float64 for float64)."""
    vocab_size, wide = w2.shape[0], wide_dtype(w2.dtype)
    mean = w2.sum(dim=0, dtype=wide).div_(vocab_size)
    if w2.is_cuda and w2.dtype != wide:  # 16-bit products are exact in fp32: the mean is subtracted afterwards
        covariance = product(w2.T, w2).div_(vocab_size).addr_(mean, mean, alpha=-1)
    else:
        covariance = _centred_gram(w2, mean).div_(vocab_size).to(wide)
    return Moments(mean, covariance)


def _centred_gram(w2: Tensor, mean: Tensor) -> Tensor:
    """(W2 - 1 mean)^T (W2 - 1 mean) [D, D], summed over blocks of rows.

    On a CPU in float64 over short products, since a long sum of squares in fp32 would lose two digits.
    """
    vocab_size, width = w2.shape
    total, step = (mean.dtype, _BLOCK) if w2.is_cuda else (torch.float64, _BLOCK // 4)
    gram = torch.zeros(width, width, dtype=total, device=w2.device)
    buffer = mean.new_empty(min(step, vocab_size), width)
    for start in range(0, vocab_size, step):
        rows = w2[start : start + step]
        centred = torch.sub(rows, mean, out=buffer[: len(rows)])
        if w2.is_cuda:
            gram.addmm_(centred.T, centred)
        else:
            _accumulate_gram(gram, centred)
    if not w2.is_cuda:
        _mirror(gram)
    return gram


def _pieces(width: int) -> list[slice]:
    """Thirds of the columns: six of nine block products give a symmetric matrix."""
    edges = [round(width * i / 3) for i in range(4)] if width >= 192 else [0, width]
    return [slice(a, b) for a, b in pairwise(edges)]


def _accumulate_gram(gram: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper block triangle of `gram`."""
    for left in _pieces(gram.shape[0]):
        columns = slice(left.start, gram.shape[0])
        gram[left, columns] += rows[:, left].T @ rows[:, columns]


def _mirror(gram: Tensor) -> None:
    """Copy the upper block triangle to the lower one."""
    pieces = _pieces(gram.shape[0])
    for i, left in enumerate(pieces):
        for right in pieces[i + 1 :]:
            gram[right, left] = gram[left, right].T


@dataclass
class LogitStatistics:
    """Mean and reciprocal standard deviation of each token's V logits."""

    mu: Tensor
    """[N]"""
    rstd: Tensor
    """[N]"""

    def gradients(self, g_sum: Tensor, g_zhat_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of mean and variance [N] from the sums over V of g / std and g zhat; g is that of zhat."""
        return -g_sum, -0.5 * self.rstd.square() * g_zhat_sum

    def g_zhat_sum(self, h: Tensor, g_w2: Tensor, g_sum: Tensor) -> Tensor:
        """Sum over V of g zhat [N], from h [N, D], the sum of g / std W2 [N, D] and that of g / std: z = h W2^T."""
        return (g_w2 * h).sum(dim=1) - self.mu * g_sum


def logit_statistics(h: Tensor, moments: Moments, eps: float) -> LogitStatistics:
    """mu and 1/sqrt(var + eps) of the logits of h [N, D]."""
    wide = moments.mean.dtype
    mu = h.to(wide) @ moments.mean
    variance = (product_with_wide(h, moments.covariance) * h).sum(dim=-1)
    return LogitStatistics(mu, torch.rsqrt(variance.clamp_min(0) + eps))


def swept_statistics(h: Tensor, w2: Tensor, eps: float) -> LogitStatistics:
    """The same from the logits themselves, block by block: 2 N V D FLOPs, cheaper than the moments for few tokens."""
    wide = wide_dtype(w2.dtype)
    mean = torch.stack([w2[i : i + _BLOCK].sum(dim=0, dtype=wide) for i in range(0, w2.shape[0], _BLOCK)]).sum(dim=0)
    mu = h.to(wide) @ (mean / w2.shape[0])
    variance = torch.zeros_like(mu)
    for start in range(0, w2.shape[0], _BLOCK):
        logits = product(h, w2[start : start + _BLOCK].T)
        variance += logits.sub_(mu.unsqueeze(1)).square_().sum(dim=1)
    return LogitStatistics(mu, torch.rsqrt(variance / w2.shape[0] + eps))


def add_hidden_gradient(grad_h: Tensor, h: Tensor, moments: Moments, grad_mu: Tensor, grad_var: Tensor) -> None:
    """Add to grad_h [N, D] what reaches h through mu and var: grad_mu w + 2 grad_var h C."""
    grad_h.addr_(grad_mu, moments.mean)
    grad_h.addcmul_(product_with_wide(h, moments.covariance), grad_var.unsqueeze(1), value=2)


def add_weight_gradient(
    grad_w2: Tensor, h: Tensor, w2: Tensor, moments: Moments, grad_mu: Tensor, grad_var: Tensor
) -> None:
    """Add to grad_w2 [V, D] what reaches W2 through mu and var.

    Row v gets (1/V) sum_n grad_mu h + (2/V) (W2_v - w) S with S = sum_n grad_var h^T h.
    """
    vocab_size, wide = w2.shape[0], moments.mean.dtype
    h_wide = h.to(wide)
    weighted = h_wide * grad_var.unsqueeze(1)  # [N, D]
    scale = 2.0 / vocab_size
    tensor_cores = h.is_cuda and h.dtype != wide
    second = product(weighted.to(h.dtype).T, h) if tensor_cores else weighted.T @ h_wide  # S [D, D]
    row = (grad_mu @ h_wide) / vocab_size - scale * (moments.mean @ second)
    if tensor_cores:
        grad_w2.addmm_(w2, (scale * second).to(w2.dtype))
        _add_row(grad_w2, row)
    elif grad_w2.dtype == wide:
        grad_w2.addmm_(w2, second, alpha=scale).add_(row)
    else:
        for start in range(0, vocab_size, _BLOCK):
            block = slice(start, start + _BLOCK)
            grad_w2[block] = grad_w2[block].to(wide).addmm_(w2[block].to(wide), second, alpha=scale).add_(row)


def _add_row(matrix: Tensor, row: Tensor) -> None:
    """Add row [D] in fp32 to every row of a 16-bit matrix [V, D], as a product with fp32 sums.

    The row is the sum of a high and a low part. PyTorch's own addition of a row took 0.8 to 1.1 ms on an H100 at
    V = 128,256 and D = 2,048, a product of this depth 0.5 ms (`benchmarks/row_kernels.py`).
    """
    parts = row.new_zeros(16, len(row), dtype=matrix.dtype)
    parts[0] = row
    parts[1] = row - parts[0].to(row.dtype)
    matrix.addmm_(matrix.new_ones(len(matrix), 16), parts)

"""The small products of the ALIGN operator in the forms to choose from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _common import timed
from torch import Tensor

from alignvlm.kernels.align import vocab_moments
from alignvlm.kernels.align.moments import add_weight_gradient
from alignvlm.kernels.align.vocab_blocks import default_block
from alignvlm.kernels.matmul import accumulate, product


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
    zeros = moments.mean.new_zeros(num_tokens)
    measure("dW2 correction, as now", lambda: add_weight_gradient(grad_w2, h, w2, moments, zeros, zeros))
    second = values(width, width)
    measure("dW2 correction: addmm_ in place", lambda: grad_w2.addmm_(w2, second))
    measure("dW2 correction: the row, add_ in place", lambda: grad_w2.add_(moments.mean))
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

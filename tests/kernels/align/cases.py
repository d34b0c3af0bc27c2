"""Problems for the ALIGN operator and their float64 solutions, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignvlm.kernels import vocab_softmax

NAMES = ("h", "w2", "e", "gamma", "beta")
VOCAB_BLOCKS = {"implementation": "vocab_blocks"}
TOKEN_CHUNKS = {"implementation": "token_chunks"}


def problem(
    num_tokens: int,
    vocab_size: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    gamma: bool = True,
    beta: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Inputs of `vocab_softmax` that require gradients; `scale` multiplies gamma, so it sharpens the softmax."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made: dict[str, Tensor | None] = {
        "h": values(num_tokens, width),
        "w2": values(vocab_size, width) + 0.3 * values(width),
        "e": values(vocab_size, width),
        "gamma": scale * (1 + 0.2 * values(vocab_size)) if gamma else None,
        "beta": values(vocab_size) if beta else None,
    }
    return {k: None if v is None else v.to(device, dtype).requires_grad_() for k, v in made.items()}


def solve(
    inputs: dict[str, Tensor | None], upstream: Tensor | None = None, *, exactly: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients by name; `exactly` solves the same (rounded) inputs with the reference in float64."""
    values = {k: None if v is None else v.detach() for k, v in inputs.items()}
    if exactly:
        values = {k: None if v is None else v.double() for k, v in values.items()}
        options = {k: v for k, v in options.items() if k in ("eps", "normalize")} | {"implementation": "reference"}
    values = {
        k: None if v is None else v.requires_grad_(inputs[k].requires_grad)  # type: ignore[union-attr]
        for k, v in values.items()
    }
    out = vocab_softmax(**values, **options)  # type: ignore[arg-type]
    upstream = make_upstream(out) if upstream is None else upstream
    wanted = [k for k, v in values.items() if v is not None and v.requires_grad]
    grads = torch.autograd.grad(out, [values[k] for k in wanted], upstream.to(out.dtype), allow_unused=True)
    return {"out": out.detach()} | {k: g for k, g in zip(wanted, grads, strict=True) if g is not None}


def make_upstream(out: Tensor) -> Tensor:
    """A fixed gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def worst_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest difference over all results, each measured against its largest exact value."""
    assert found.keys() == exact.keys()
    errors = [0.0]
    for name, value in exact.items():
        if value.numel():
            assert torch.isfinite(found[name]).all(), name
            errors.append(float((found[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-9)))
    return max(errors)


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products and remembers the operators called and the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name == "mkldnn_convolution":  # one pixel per row of the left matrix
            self.flops += 2 * args[0].shape[2] * args[1].shape[0] * args[1].shape[1]
        if isinstance(result, torch.Tensor) and "view" not in name and name != "t":
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result

"""`vocab_softmax`: checks arguments, applies autocast, and chooses an implementation from the one list of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvlm.kernels.align.common import Settings
from alignvlm.kernels.align.costs import VocabSoftmaxOnMeta
from alignvlm.kernels.align.moments import Moments, SharedMoments
from alignvlm.kernels.align.reference import vocab_softmax_reference
from alignvlm.kernels.align.rows_torch import TorchRows
from alignvlm.kernels.align.token_chunks import TokenChunks
from alignvlm.kernels.align.vocab_blocks import VocabBlocks


def _reference(
    h: Tensor, w2: Tensor, e: Tensor, gamma: Tensor | None, beta: Tensor | None, settings: Settings
) -> Tensor:
    return vocab_softmax_reference(h, w2, e, gamma, beta, eps=settings.eps, normalize=settings.normalize)


def _token_chunks(*arguments: Tensor | Settings | None) -> Tensor:
    out: Tensor = TokenChunks.apply(*arguments)
    return out


def _vocab_blocks(*arguments: Tensor | Settings | None) -> Tensor:
    out: Tensor = VocabBlocks.apply(*arguments, TorchRows)
    return out


def _triton(*arguments: Tensor | Settings | None) -> Tensor:
    from alignvlm.kernels.align.rows_triton import TritonRows

    out: Tensor = VocabBlocks.apply(*arguments, TritonRows)
    return out


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operator, and what it can compute."""

    run: Callable[..., Tensor]
    """(h, w2, e, gamma, beta, settings) -> [N, D_e]"""
    dtypes: tuple[torch.dtype, ...]
    takes_moments: bool = True
    computes_moments: bool = False
    """Whether it needs moments in training, and computes those that nobody gives it."""


_ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = {
    "reference": Implementation(_reference, _ALL, takes_moments=False),
    "token_chunks": Implementation(_token_chunks, (torch.float64, torch.float32)),
    "vocab_blocks": Implementation(_vocab_blocks, _ALL, computes_moments=True),
    "triton": Implementation(_triton, (torch.float32, torch.bfloat16), computes_moments=True),
}


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    """The default for a device and a dtype."""
    fast = "triton" if device.type == "cuda" else "token_chunks"
    has_library = device.type != "cuda" or importlib.util.find_spec("triton") is not None
    return fast if has_library and dtype in IMPLEMENTATIONS[fast].dtypes else "vocab_blocks"


def vocab_softmax(
    h: Tensor,
    w2: Tensor,
    e: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
    moments: Moments | SharedMoments | None = None,
    kept_bytes: int = 0,
    block: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Average the rows of E with the weights softmax(LN_V(h W2^T)): AlignVLM's connector (arXiv 2502.01341, eq. 1-2).

        out = softmax(gamma * LN_V(h W2^T) + beta) E

    Gradients reach h, w2, e, gamma and beta; those that do not require one cost nothing. Under autocast h, w2 and e
    are cast as by `torch.nn.functional.linear`. Statistics and sums are in fp32 (float64 for float64).

    Args:
        h: [N, D] float64, float32, bfloat16 or float16; N may be 0.
        w2: [V, D], same dtype and device as h.
        e: [V, D_e], same dtype and device; may be a parameter that others use too (tied embeddings).
        gamma, beta: [V] in any floating dtype; scale and shift of the LayerNorm over V, or of the raw logits.
        eps: of the LayerNorm over V.
        normalize: False leaves the LayerNorm over V out.
        moments: `vocab_moments(w2)` computed earlier for the same weights, or, with `constant=True`, those of
            the whole vocabulary when w2 holds a part of it. `SharedMoments` computes them once, if the implementation
            needs them. None computes them every time.
        kept_bytes: for logits that the forward pass keeps until the backward pass, instead of having them computed
            again; whole blocks, from the first. token_chunks keeps its last chunk whatever this says.
        block: vocabulary rows per block; None chooses.
        implementation: "reference" (keeps N x V), "token_chunks" (some tokens against the whole vocabulary; made for a
            CPU, float32 and float64), "vocab_blocks" (all tokens against blocks of the vocabulary; plain PyTorch, any
            device and dtype), "triton" (the same with Triton kernels; float32 and bfloat16 on CUDA, or on a CPU under
            TRITON_INTERPRET=1). None takes token_chunks on a CPU and triton on CUDA where they know the dtype, else
            vocab_blocks. On the meta device there is one form only, for counting (costs.py).

    Returns:
        [N, D_e] in the dtype of e.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message names the argument.
    """
    autocast = not h.is_meta and torch.is_autocast_enabled(h.device.type) and h.dtype != torch.float64
    _check_matrices(h, w2, e, check_dtype=not autocast)
    _check_vectors(h, w2, {"gamma": gamma, "beta": beta})
    _check_options(w2, eps, normalize, moments, block, kept_bytes)
    if h.is_meta:
        on_meta: Tensor = VocabSoftmaxOnMeta.apply(h, w2, e, gamma, beta)
        return on_meta
    if autocast:
        dtype = torch.get_autocast_dtype(h.device.type)
        h, w2, e = h.to(dtype), w2.to(dtype), e.to(dtype)
    chosen = _implementation(implementation or _choose(h.device, h.dtype), h.dtype, moments)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h, w2, e, gamma, beta))
    with torch.autocast(h.device.type, enabled=False):
        if isinstance(moments, SharedMoments):
            moments = moments.of(w2) if chosen.computes_moments else None
        return chosen.run(h, w2, e, gamma, beta, Settings(eps, normalize, moments, block, kept_bytes, needs_grad))


def _implementation(name: str, dtype: torch.dtype, moments: Moments | SharedMoments | None) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {name!r}")
    found = IMPLEMENTATIONS[name]
    if dtype not in found.dtypes:
        raise ValueError(f"implementation {name!r} takes {', '.join(map(str, found.dtypes))}, not {dtype}")
    if isinstance(moments, Moments) and not found.takes_moments:
        raise ValueError(f"implementation {name!r} takes no moments")
    return found


def _check_matrices(h: Tensor, w2: Tensor, e: Tensor, *, check_dtype: bool) -> None:
    for name, matrix in (("h", h), ("w2", w2), ("e", e)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, not shape {tuple(matrix.shape)}")
        if not matrix.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {matrix.dtype}")
        if matrix.device != h.device:
            raise ValueError(f"{name} is on {matrix.device} but h is on {h.device}")
        if check_dtype and matrix.dtype != h.dtype:
            raise ValueError(f"{name} is {matrix.dtype} but h is {h.dtype}")
    if w2.shape[1] != h.shape[1]:
        raise ValueError(f"w2 must be [V, {h.shape[1]}] to fit h {tuple(h.shape)}, not {tuple(w2.shape)}")
    if w2.shape[0] == 0:
        raise ValueError("w2 has no rows: the vocabulary is empty")
    if e.shape[0] != w2.shape[0]:
        raise ValueError(f"e has {e.shape[0]} rows but w2 has {w2.shape[0]}: both must have one per vocabulary entry")


def _check_vectors(h: Tensor, w2: Tensor, vectors: dict[str, Tensor | None]) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != w2.shape[:1]:
            raise ValueError(f"{name} must be [{w2.shape[0]}], one value per row of w2, not {tuple(vector.shape)}")
        if not vector.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {vector.dtype}")
        if vector.device != h.device:
            raise ValueError(f"{name} is on {vector.device} but h is on {h.device}")


def _check_options(
    w2: Tensor,
    eps: float,
    normalize: bool,
    moments: Moments | SharedMoments | None,
    block: int | None,
    kept_bytes: int,
) -> None:
    for name, value, least in (("eps", eps, 0), ("block", block, 1), ("kept_bytes", kept_bytes, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}")
    if moments is not None and not normalize:
        raise ValueError("moments are given but normalize is False: nothing would use them")
    if isinstance(moments, Moments):
        moments.check(w2)

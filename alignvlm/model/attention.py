"""Attention over packed documents: which kernel, and the layout it needs. Documents never see each other.

A packed micro-batch is one flat sequence with cumulative document lengths. Four implementations give the same
result: the packages flash-attn-4 ("flash4", Hopper and later) and flash-attn ("flash"), PyTorch's variable-length
flash kernel ("varlen", all CUDA) and SDPA per document ("sdpa", anywhere). They are for packed micro-batches;
generation uses transformers' own SDPA.

transformers makes no mask for implementations whose masks it does not know. None is needed here, and its search for
packed documents in `position_ids` would make the host wait for the GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_4_available

SDPA = "alignvlm_sdpa"
VARLEN = "alignvlm_varlen"
FLASH = "alignvlm_flash"
FLASH4 = "alignvlm_flash4"
PACKED = (SDPA, VARLEN, FLASH, FLASH4)
"""The implementations that keep packed documents apart, in any language model that lets transformers choose."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flat sequence lie, prepared once per forward pass for all layers."""

    cu_seqlens: torch.Tensor
    """Cumulative lengths, int32 [num_documents + 1]."""
    max_seqlen: int
    buckets: tuple[torch.Tensor, ...] = ()
    """For SDPA: token indices [documents, padded length] of documents of similar length."""
    inverse: torch.Tensor | None = None
    """For SDPA: where each token [T] lies in the concatenation of the flattened buckets."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, max_seqlen: int, implementation: str) -> Documents:
        """Lay out the documents for one implementation, on the device of `cu_seqlens`, int32 [num_documents + 1].

        For SDPA the lengths are read: on a GPU's tensor the host waits for the GPU.
        """
        if implementation != SDPA or len(cu_seqlens) == 2:
            return cls(cu_seqlens, max_seqlen)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        rank = torch.ceil(torch.log2(lengths.double())).long()  # documents of a bucket differ at most by a factor of 2
        buckets, flat = [], []
        for power in rank.unique().tolist():
            chosen = (rank == power).nonzero().squeeze(1)
            steps = torch.arange(int(lengths[chosen].max()), device=cu_seqlens.device)
            real = steps < lengths[chosen, None]
            buckets.append(torch.where(real, starts[chosen, None] + steps, starts[chosen, None]))
            flat.append(torch.where(real, buckets[-1], -1).flatten())
        order = torch.cat(flat)
        places = (order >= 0).nonzero().squeeze(1)
        inverse = torch.empty(len(places), dtype=torch.long, device=cu_seqlens.device)
        inverse[order[places]] = places
        return cls(cu_seqlens, max_seqlen, tuple(buckets), inverse)

    def to(self, device: torch.device) -> Documents:
        """The same on another device, copied without waiting."""
        move = lambda tensor: tensor.to(device, non_blocking=True)
        return replace(
            self,
            cu_seqlens=move(self.cu_seqlens),
            buckets=tuple(map(move, self.buckets)),
            inverse=None if self.inverse is None else move(self.inverse),
        )


def choose_attention(name: str, device: torch.device, precision: str) -> str:
    """The implementation for a recipe's `model.attention` and `train.precision` on this device.

    Raises:
        ValueError: when the implementation asked for cannot run here.
    """
    is_fit = device.type == "cuda" and precision == "bf16"  # flash kernels take 16 bits only
    has_flash = is_fit and is_flash_attn_2_available()
    has_varlen = is_fit and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if name == "auto":
        return FLASH if has_flash else VARLEN if has_varlen else SDPA
    if name == "flash4" and not (is_fit and flash4_available(device)):
        raise ValueError(
            "model.attention = 'flash4' needs a GPU of compute capability 9 or higher, bf16 and the flash-attn-4 "
            "package with its cu13 (or cu12) libraries; use 'auto'"
        )
    if name == "flash" and not has_flash:
        raise ValueError("model.attention = 'flash' needs a CUDA device, bf16 and the flash-attn package; use 'auto'")
    if name == "varlen" and not has_varlen:
        raise ValueError("model.attention = 'varlen' needs a CUDA device, bf16 and torch >= 2.10; use 'auto'")
    return {"flash4": FLASH4, "flash": FLASH, "varlen": VARLEN, "sdpa": SDPA}[name]


def flash4_available(device: torch.device) -> bool:
    """Whether the flash-attn-4 package can run on this CUDA device: its kernels are for Hopper and later."""
    return is_flash_attn_4_available() and torch.cuda.get_device_capability(device)[0] >= 9


def sdpa_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA inside each document; query [1, H, T, d], key and value [1, H_kv, T, d], returns [1, T, H, d].

    Documents of similar length become a right-padded batch: under a causal mask the padding is never seen.
    """
    documents = _packed(documents)
    _refuse_window(sliding_window, documents)
    _refuse_variants(kwargs)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa)

    if not documents.buckets:
        return attend(query, key, value).transpose(1, 2), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, d]
    outputs = []
    for bucket in documents.buckets:
        q, k, v = (x[bucket].transpose(1, 2) for x in rows)  # [documents, H, L, d]
        outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[documents.inverse][None], None


def varlen_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_per_document`, through `torch.nn.attention.varlen` (CUDA, 16-bit)."""
    documents = _packed(documents)
    _refuse_window(sliding_window, documents)
    _refuse_variants(kwargs)
    from torch.nn.attention.varlen import varlen_attn

    arguments = _varlen_arguments()
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, H, d]
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, **arguments)
    return out[None], None


def flash_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_per_document`, through the flash-attn package (CUDA, 16-bit), which knows windows and soft caps."""
    documents = _packed(documents)
    _refuse_variants(kwargs)
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    before = -1 if sliding_window is None else sliding_window - 1  # tokens before itself that a token sees
    out = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest,
        dropout_p=dropout, softmax_scale=scaling, causal=True, window_size=(before, 0), softcap=softcap or 0.0,
    )  # fmt: skip
    return out[None], None


def flash4_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `flash_per_document`, through the flash-attn-4 package (compute capability 9 or higher, 16-bit)."""
    documents = _packed(documents)
    _refuse_variants(kwargs)
    if dropout:
        raise ValueError(f"flash-attn-4 has no dropout, but this LM drops {dropout}: set model.attention to 'flash'")
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    window = (None, None) if sliding_window is None else (sliding_window - 1, 0)
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scaling, causal=True, window_size=window, softcap=softcap or 0.0,
    )  # fmt: skip
    return (out[0] if isinstance(out, tuple) else out)[None], None


def _packed(documents: Documents | None) -> Documents:
    if documents is None:
        raise ValueError(
            "this attention is for packed micro-batches (cu_seqlens, max_seqlen); set_attn_implementation('sdpa') for "
            "anything else"
        )
    return documents


def _refuse_variants(kwargs: dict[str, Any]) -> None:
    """Kinds of attention that would be left out in silence: soft-capped scores, attention sinks."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this LM's attention has {name!r}, which alignvlm's packed attention does not know")


def _refuse_window(sliding_window: int | None, documents: Documents) -> None:
    if sliding_window is not None and documents.max_seqlen > sliding_window:
        raise ValueError(
            f"this LM attends in windows of {sliding_window} tokens, shorter than a document of "
            f"{documents.max_seqlen}: install flash-attn (model.attention = 'flash') or lower sequence_length"
        )


@lru_cache(maxsize=1)
def _varlen_arguments() -> dict[str, Any]:
    """How this torch says causal (2.10: `is_causal`, later `window_size`) and, where it must be said, grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


def register() -> None:
    """Make the implementations known to transformers; called once when `alignvlm.model` is imported."""
    functions = {
        SDPA: sdpa_per_document,
        VARLEN: varlen_per_document,
        FLASH: flash_per_document,
        FLASH4: flash4_per_document,
    }
    for name, function in functions.items():
        AttentionInterface.register(name, function)

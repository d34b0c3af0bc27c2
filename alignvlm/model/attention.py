"""Attention over packed documents: which kernel, and the layout it needs. Documents never see each other.

A packed micro-batch is one flat sequence with cumulative document lengths. Three implementations give the same
result: flash-attn through transformers ("flash"), PyTorch's variable-length flash kernel ("varlen", CUDA) and SDPA
per document ("sdpa", anywhere). Without a layout (generation) the latter two are transformers' own SDPA.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA = "alignvlm_sdpa"
VARLEN = "alignvlm_varlen"
FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flat sequence lie, prepared once per forward pass for all layers."""

    cu_seqlens: torch.Tensor
    """Cumulative lengths, int32 [num_documents + 1], on the model's device."""
    max_seqlen: int
    buckets: tuple[torch.Tensor, ...] = ()
    """For SDPA: token indices [documents, padded length] of documents of similar length."""
    inverse: torch.Tensor | None = None
    """For SDPA: where each token [T] lies in the concatenation of the flattened buckets."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, max_seqlen: int, implementation: str) -> Documents:
        """Lay out the documents for one implementation; `cu_seqlens` is int32 [num_documents + 1]."""
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


def choose_attention(name: str, device: torch.device) -> str:
    """The transformers implementation for a recipe's `model.attention` on this device.

    Raises:
        ValueError: when the implementation asked for cannot run here.
    """
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    has_varlen = device.type == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if name == "auto":
        return FLASH if has_flash else VARLEN if has_varlen else SDPA
    if name == "flash" and not has_flash:
        raise ValueError("model.attention = 'flash' needs a CUDA device and the flash-attn package; use 'auto'")
    if name == "varlen" and not has_varlen:
        raise ValueError("model.attention = 'varlen' needs a CUDA device and torch >= 2.10; use 'auto'")
    return {"flash": FLASH, "varlen": VARLEN, "sdpa": SDPA}[name]


def attention_kwargs(documents: Documents) -> dict[str, Any]:
    """What the layers of a transformers LM pass through to the attention function for packed documents."""
    return {
        "cu_seq_lens_q": documents.cu_seqlens,
        "cu_seq_lens_k": documents.cu_seqlens,
        "max_length_q": documents.max_seqlen,
        "max_length_k": documents.max_seqlen,
        "documents": documents,
    }


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
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_window(sliding_window, documents)

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
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_window(sliding_window, documents)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, H, d]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, **_causal_argument())
    return out[None], None


def _refuse_window(sliding_window: int | None, documents: Documents) -> None:
    if sliding_window is not None and documents.max_seqlen > sliding_window:
        raise ValueError(
            f"this LM attends in windows of {sliding_window} tokens, shorter than a document of "
            f"{documents.max_seqlen}: install flash-attn (model.attention = 'flash') or lower sequence_length"
        )


@lru_cache(maxsize=1)
def _causal_argument() -> dict[str, Any]:
    """torch 2.10 says `is_causal`, later versions `window_size`."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    return {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}


def document_mask(*, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """No mask tensor where causality is all there is (packed documents, or no padding); transformers' one elsewhere."""
    if attention_mask is None and q_length == kv_length and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make the implementations known to transformers; called once when `alignvlm.model` is imported."""
    for name, function in ((SDPA, sdpa_per_document), (VARLEN, varlen_per_document)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, document_mask)

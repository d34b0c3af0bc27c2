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
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_4_available

SDPA = "alignvlm_sdpa"
VARLEN = "alignvlm_varlen"
FLASH = "alignvlm_flash"
FLASH4 = "alignvlm_flash4"


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
    if name == "auto":
        return FLASH if has_flash else VARLEN if is_fit else SDPA
    if name == "flash4" and not (is_fit and flash4_available(device)):
        raise ValueError(
            "model.attention = 'flash4' needs a GPU of compute capability 9 or higher, bf16 and the flash-attn-4 "
            "package with its cu13 (or cu12) libraries; use 'auto'"
        )
    if name == "flash" and not has_flash:
        raise ValueError("model.attention = 'flash' needs a CUDA device, bf16 and the flash-attn package; use 'auto'")
    if name == "varlen" and not is_fit:
        raise ValueError("model.attention = 'varlen' needs a CUDA device and bf16; use 'auto'")
    return {"flash4": FLASH4, "flash": FLASH, "varlen": VARLEN, "sdpa": SDPA}[name]


def flash4_available(device: torch.device) -> bool:
    """Whether the flash-attn-4 package can run on this CUDA device: its kernels are for Hopper and later.

    The compiler of its kernels, `cutlass`, comes in a folder that only Python's own `site-packages` adds to the path: a
    copy made by `pip install --target` is not found.
    """
    has_compiler = importlib.util.find_spec("cutlass") is not None
    return is_flash_attn_4_available() and has_compiler and torch.cuda.get_device_capability(device)[0] >= 9


@dataclass(frozen=True)
class Asked:
    """What a language model asks of its attention besides query, key and value."""

    scale: float | None
    """Factor of the scores; None is 1 / sqrt(d)."""
    dropout: float
    """Share of the weights that is dropped."""
    window: int | None
    """How many tokens a token sees, itself included; None: all before it."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap); None leaves them as they are."""


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, Asked], torch.Tensor]
"""Causal attention inside each document: query [T, H, d], key and value [T, H_kv, d] -> [T, H, d]."""


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, asked: Asked) -> torch.Tensor:
    """The flash-attn package (CUDA, 16-bit)."""
    from flash_attn import flash_attn_varlen_func

    cu, longest = documents.cu_seqlens, documents.max_seqlen
    before = -1 if asked.window is None else asked.window - 1  # tokens before itself that a token sees
    out: torch.Tensor = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest,
        dropout_p=asked.dropout, softmax_scale=asked.scale, causal=True, window_size=(before, 0),
        softcap=asked.softcap or 0.0,
    )  # fmt: skip
    return out


def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, asked: Asked) -> torch.Tensor:
    """The flash-attn-4 package (compute capability 9 or higher, 16-bit)."""
    from flash_attn.cute import flash_attn_varlen_func

    cu, longest = documents.cu_seqlens, documents.max_seqlen
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=asked.scale, causal=True, softcap=asked.softcap or 0.0,
        window_size=(None, None) if asked.window is None else (asked.window - 1, 0),
    )  # fmt: skip
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, asked: Asked) -> torch.Tensor:
    """`torch.nn.attention.varlen` (CUDA, 16-bit)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.contiguous() for x in (q, k, v))
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    causal: dict[str, Any] = {"window_size": (-1, 0), "scale": asked.scale}
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **causal, **_grouped_heads())
    return cast(torch.Tensor, out)  # asked for nothing else, it returns no tuple


@lru_cache(maxsize=1)
def _grouped_heads() -> dict[str, Any]:
    """Ask for fewer heads of keys than of queries, where this torch wants to be asked."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, asked: Asked) -> torch.Tensor:
    """SDPA, anywhere.

    Documents of similar length become a right-padded batch: under a causal mask the padding is never seen.
    """

    def attend(*rows: torch.Tensor) -> torch.Tensor:
        """[documents, L, heads, d] each -> [documents, L, H, d]."""
        query, key, value = (x.transpose(1, 2) for x in rows)
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=asked.dropout, is_causal=True, scale=asked.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2)

    if not documents.buckets:
        return attend(q[None], k[None], v[None])[0]
    outputs = [attend(q[bucket], k[bucket], v[bucket]).flatten(0, 1) for bucket in documents.buckets]
    return torch.cat(outputs)[documents.inverse]


def _per_document(kernel: Kernel, knows: Container[str]) -> Callable[..., tuple[torch.Tensor, None]]:
    """A kernel as transformers calls an attention; what the kernel does not know is refused, not left out."""

    def attention(
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
        """Query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d]."""
        if documents is None:
            raise ValueError(
                "this attention is for packed micro-batches (cu_seqlens, max_seqlen); set_attn_implementation('sdpa') "
                "for anything else"
            )
        if sliding_window is not None and "window" not in knows and documents.max_seqlen > sliding_window:
            raise ValueError(
                f"this LM attends in windows of {sliding_window} tokens, shorter than a document of "
                f"{documents.max_seqlen}: install flash-attn (model.attention = 'flash') or lower sequence_length"
            )
        if dropout and "dropout" not in knows:
            raise ValueError(
                f"this LM drops {dropout} of its attention weights, which model.attention = 'varlen' and 'flash4' "
                "cannot: take 'flash' or 'sdpa', or set its attention_dropout to 0"
            )
        for name, value_of in (("softcap", None if "softcap" in knows else softcap), ("s_aux", kwargs.get("s_aux"))):
            if value_of is not None:
                raise ValueError(f"this LM's attention has {name!r}, which alignvlm's packed attention does not know")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
        return kernel(q, k, v, documents, Asked(scaling, dropout, sliding_window, softcap))[None], None

    return attention


PACKED = {
    SDPA: _per_document(_sdpa, knows={"dropout"}),
    VARLEN: _per_document(_varlen, knows=()),
    FLASH: _per_document(_flash, knows={"dropout", "window", "softcap"}),
    FLASH4: _per_document(_flash4, knows={"window", "softcap"}),
}
"""Name -> implementation that keeps packed documents apart, in any LM that lets transformers choose its attention."""


def register() -> None:
    """Make the implementations known to transformers; called once when `alignvlm.model` is imported."""
    for name, function in PACKED.items():
        AttentionInterface.register(name, function)

"""What the flash-attn packages are asked for, with stand-ins of their documented functions, against plain attention."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from alignvlm.model import attention
from alignvlm.model.attention import FLASH, FLASH4, PACKED, VARLEN, Documents, choose_attention

LENGTHS = (1, 7, 3)
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
WINDOW, CAP, SCALE = 4, 5.0, 0.3


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, before: int | None, cap: float) -> torch.Tensor:
    """Attention [T, H, d] that is causal within documents, over `before` earlier tokens (None: all)."""
    documents, places = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)), torch.arange(len(q))
    distance = places[:, None] - places
    seen = (documents[:, None] == documents) & (distance >= 0)
    if before is not None:
        seen &= distance <= before
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    scores = cap * torch.tanh(scores / cap) if cap else scores
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """flash-attn 2.8's signature; -1 is no bound."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == ENDS.tolist()
    assert (max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal) == (7, 7, 0.0, SCALE, True)
    assert window_size[1] == 0
    return plain(q, k, v, before=None if window_size[0] < 0 else window_size[0], cap=softcap)


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, deterministic=False, return_lse=False,
):  # fmt: skip
    """flash-attn-4 4.0.0b36's signature, without what is not asked for; None is no bound; returns (out, lse)."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == ENDS.tolist()
    assert (max_seqlen_q, max_seqlen_k, softmax_scale, causal) == (7, 7, SCALE, True)
    assert window_size in ((None, None), (WINDOW - 1, 0))
    return plain(q, k, v, before=window_size[0], cap=softcap), None


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize(
    ("name", "module", "stand_in"), [(FLASH, "flash_attn", flash_attn_2), (FLASH4, "flash_attn.cute", flash_attn_4)]
)
def test_documents_windows_and_caps(name, module, stand_in, window, cap, monkeypatch) -> None:
    package = ModuleType(module)
    package.flash_attn_varlen_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, package)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, dtype=torch.float64) for heads in (4, 2, 2))
    documents = Documents.of(ENDS.int(), max(LENGTHS), FLASH)
    out, weights = PACKED[name](
        None, q, k, v, None, scaling=SCALE, documents=documents, sliding_window=window, softcap=cap
    )
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    expected = plain(*rows, before=None if window is None else window - 1, cap=cap or 0.0)
    assert weights is None
    torch.testing.assert_close(out, expected[None])


def test_flash_attn_4_is_taken_when_asked_for(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(attention, "flash4_available", lambda device: False)
    with pytest.raises(ValueError, match="flash4' needs a GPU of compute capability 9"):
        choose_attention("flash4", gpu, "bf16")
    monkeypatch.setattr(attention, "flash4_available", lambda device: True)
    assert choose_attention("flash4", gpu, "bf16") == FLASH4 != choose_attention("auto", gpu, "bf16")


def test_the_namespace_of_flash_attn_4_is_not_taken_for_flash_attn(monkeypatch) -> None:
    """Both packages are imported as `flash_attn`."""
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    gpu = torch.device("cuda")
    assert choose_attention("auto", gpu, "bf16") == VARLEN
    with pytest.raises(ValueError, match="needs a CUDA device, bf16 and the flash-attn package"):
        choose_attention("flash", gpu, "bf16")


@pytest.mark.parametrize("name", [VARLEN, FLASH4])
def test_dropout_is_refused_where_the_kernel_has_none(name) -> None:
    q = torch.zeros(1, 1, sum(LENGTHS), 8)
    with pytest.raises(ValueError, match=r"drops 0\.1 of its attention weights"):
        PACKED[name](None, q, q, q, None, dropout=0.1, documents=Documents.of(ENDS.int(), max(LENGTHS), name))

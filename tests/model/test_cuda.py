"""Attention and the vision encoder on a GPU at the sizes of real models (`make gpu-check`), against fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import is_flash_attn_2_available

from alignvlm.model.attention import FLASH, FLASH4, PACKED, SDPA, VARLEN, Documents, flash4_available

pytestmark = pytest.mark.cuda

LENGTHS = (1, 700, 64, 129, 2048, 3, 31)
HAS_FLASH4 = torch.cuda.is_available() and flash4_available(torch.device("cuda"))
IMPLEMENTATIONS = [SDPA, VARLEN, *([FLASH] if is_flash_attn_2_available() else []), *([FLASH4] if HAS_FLASH4 else [])]


def attend(implementation: str, tensors: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output [1, T, H, d], and the gradients of query, key and value, as fp32."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    documents = Documents.of(ends, max(LENGTHS), implementation).to(tensors[0].device)
    out, _ = PACKED[implementation](None, *leaves, None, scaling=leaves[0].shape[-1] ** -0.5, documents=documents)
    out.backward(upstream.to(out.dtype))
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("head_dim", "heads", "groups"), [(64, 32, 8), (128, 24, 8), (128, 32, 8)])
def test_packed_attention_at_the_sizes_of_llama(
    implementation: str, head_dim: int, heads: int, groups: int, device: torch.device
) -> None:
    """1B, 3B and 8B: outputs and gradients in bf16 against SDPA in fp32."""
    torch.manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), head_dim) for count in (heads, groups, groups)]
    tensors = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    upstream = torch.randn(1, sum(LENGTHS), heads, head_dim, device=device).bfloat16()
    exact = attend(SDPA, [tensor.float() for tensor in tensors], upstream.float())
    found = attend(implementation, tensors, upstream)
    for name, one, other in zip(("out", "query", "key", "value"), found, exact, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm(), name


def test_siglip_so400m_sees_a_tile_as_in_fp32(device: torch.device) -> None:
    """Random weights, one tile of 384 x 384: features, and the gradients of all weights."""
    config = AutoConfig.for_model(
        "siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModel.from_config(config, attn_implementation="sdpa")
        tile, upstream = torch.randn(1, 3, 384, 384), torch.randn(1, 729, 1152)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        model.zero_grad()
        features = model(pixel_values=tile.to(dtype)).last_hidden_state
        features.backward(upstream.to(dtype))
        gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        results.append((features.detach().float(), gradients))
    (features, gradients), (found, found_gradients) = results
    assert found.shape == (1, 729, 1152)
    assert (found - features).norm() < 3e-2 * features.norm()
    assert (found_gradients - gradients).norm() < 5e-2 * gradients.norm()

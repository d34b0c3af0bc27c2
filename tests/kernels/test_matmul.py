"""Matrix products on a CPU: whichever library computes them, they are the same products."""

from __future__ import annotations

import pytest
import torch

from alignvlm.kernels.matmul import product_nt
from tests.kernels.align.cases import Products


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 1, 1), (37, 5, 11), (300, 70, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_a_transposed_matrix(
    shape: tuple[int, int, int], dtype: torch.dtype, strided: bool, biased: bool
) -> None:
    num_rows, num_columns, width = shape
    a, b = torch.randn(num_rows, width, dtype=dtype), torch.randn(num_columns, width, dtype=dtype)
    bias = torch.randn(num_columns, dtype=dtype) if biased else None
    if strided:
        a, b = a.T.contiguous().T, b.repeat_interleave(2, dim=0)[::2]
    expected = a.double() @ b.double().T + (0 if bias is None else bias.double())
    found = product_nt(a, b, bias)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def calls_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether a product goes to oneDNN; checks its values either way."""
    a, b, bias = torch.randn(37, 11, dtype=dtype), torch.randn(5, 11, dtype=dtype), torch.randn(5, dtype=dtype)
    with Products() as seen:
        found = product_nt(a, b, bias)
    torch.testing.assert_close(found, torch.addmm(bias, a, b.T), rtol=1e-5, atol=1e-5)
    return "mkldnn_convolution" in seen.names


def test_onednn_is_left_out_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_onednn() == torch.backends.mkldnn.is_available()
    assert not calls_onednn(torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not calls_onednn()
    monkeypatch.delattr(torch, "mkldnn_convolution")
    assert not calls_onednn()

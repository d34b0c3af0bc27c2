"""The memory-lean token loss against torch's cross entropy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear

from alignvlm.kernels import linear_cross_entropy
from tests.fixtures.live_bytes import LiveBytes
from tests.kernels.align.cases import Products


def tensors(num_rows: int, vocab: int, width: int, bias: bool, dtype: torch.dtype = torch.float64) -> list:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, width, dtype=dtype).requires_grad_() for n in (num_rows, vocab))
    labels = torch.randint(0, vocab, (num_rows,))
    labels[::3] = -100
    return [hidden, weight, labels, torch.randn(vocab, dtype=dtype).requires_grad_() if bias else None]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(1, 8)),
    chunk=st.integers(1, 10),
    bias=st.booleans(),
)
def test_any_shape(shape: tuple[int, int, int], chunk: int, bias: bool) -> None:
    hidden, weight, labels, b = tensors(*shape, bias)
    wanted = [t for t in (hidden, weight, b) if t is not None]
    each = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    found = linear_cross_entropy(hidden, weight, labels, b, chunk=chunk, token_losses=each)
    assert torch.equal(found, linear_cross_entropy(hidden, weight, labels, b, chunk=chunk))
    exact = cross_entropy(linear(hidden, weight, b), labels, reduction="sum")
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(each, cross_entropy(linear(hidden, weight, b), labels, reduction="none").detach())
    for one, other in zip(torch.autograd.grad(found / 3, wanted), torch.autograd.grad(exact / 3, wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [7, 300])
def test_bfloat16_keeps_fp32_sums(chunk: int) -> None:
    hidden, weight, labels, _ = tensors(300, 100, 16, False, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    exact = cross_entropy(linear(hidden.double(), weight.double()), labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 1e-3
    grads = torch.autograd.grad(loss, (hidden, weight))
    for found, other in zip(grads, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - other).abs().max() < 2e-2 * other.abs().max()


def test_frozen_head_and_inference_do_less() -> None:
    hidden, weight, labels, _ = tensors(8, 30, 4, False)
    unit, flops = 2 * 8 * 30 * 4, []
    for frozen, no_grad in ((False, False), (True, False), (False, True)):
        weight.requires_grad_(not frozen)
        with Products() as counted, torch.set_grad_enabled(not no_grad):
            loss = linear_cross_entropy(hidden, weight, labels)
        flops.append(counted.flops)
        assert loss.requires_grad is not no_grad
    assert flops == [3 * unit, 2 * unit, unit]


@pytest.mark.parametrize("no_grad", [False, True])
def test_chunks_live_one_after_the_other(no_grad: bool) -> None:
    most = []
    for num_chunks in (1, 4):
        hidden, weight, labels, _ = tensors(64 * num_chunks, 4000, 8, False, torch.float32)
        weight.requires_grad_(False)
        with LiveBytes([hidden, weight, labels]) as live, torch.set_grad_enabled(not no_grad):
            linear_cross_entropy(hidden, weight, labels, chunk=64)
        most.append(live.most)
    assert most[1] < 1.05 * most[0]


def test_autocast() -> None:
    hidden, weight, labels, _ = tensors(8, 30, 4, False, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, "hidden"),
        ({"weight": torch.zeros(7, 5)}, "weight"),
        ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, "weight is torch.float64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(3)}, "labels"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, "labels is on meta"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"chunk": 0}, "chunk"),
        ({"implementation": "fast"}, "implementation"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_cross_entropy(**(arguments | change))

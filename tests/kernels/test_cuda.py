"""The operator and the token loss on a GPU (`make gpu-check`): kernels, numerics, memory, repeatability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from alignvlm.kernels import linear_cross_entropy
from alignvlm.kernels.matmul import accumulate, product, product_with_wide
from tests.kernels.align.cases import problem, solve, worst_error
from tests.kernels.align.row_checks import CHECKS

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rows(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_precision_products(dtype: torch.dtype) -> None:
    a, b = (torch.randn(64, 64, device="cuda", dtype=dtype) for _ in range(2))
    exact = a.double() @ b.double()
    acc = torch.ones(64, 64, device="cuda")
    accumulate(acc, a, b)
    wide = torch.randn(64, 64, device="cuda")
    for found, expected in (
        (product(a, b), exact),
        (acc, exact + 1),
        (product_with_wide(a, wide), a.double() @ wide.double()),
    ):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("implementation", ["triton", "vocab_blocks"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_full_vocabulary(dtype: torch.dtype, bound: float, implementation: str, scale: float) -> None:
    inputs = problem(48, 128_256, 128, dtype=dtype, device="cuda", scale=scale)
    found, exact = solve(inputs, implementation=implementation), solve(inputs, exactly=True)
    eager = solve(inputs, implementation="reference")
    for name, value in exact.items():
        allowed = max(bound, 3 * worst_error({name: eager[name]}, {name: value}))
        assert worst_error({name: found[name]}, {name: value}) < allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = problem(300, 20_000, 256, dtype=dtype, device="cuda")
    first, second = solve(inputs), solve(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("shape", [(8193, 4000, 256), (8200, 9000, 64), (1000, 17_000, 64)])
def test_blocks_of_training(shape: tuple[int, int, int]) -> None:
    """More tokens than a block has rows, numbers of tokens beside tiles of 128, a last block that is smaller."""
    inputs = problem(*shape, dtype=torch.bfloat16, device="cuda")
    found, exact = solve(inputs), solve(inputs, exactly=True)
    eager = solve(inputs, implementation="reference")
    for name, value in exact.items():
        allowed = max(2e-2, 3 * worst_error({name: eager[name]}, {name: value}))
        assert worst_error({name: found[name]}, {name: value}) < allowed, name


def test_extra_memory_stays_small() -> None:
    tokens, vocab, width = 4096, 65_536, 512
    inputs = problem(tokens, vocab, width, dtype=torch.bfloat16, device="cuda")
    upstream = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    solve(inputs, upstream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = solve(inputs, upstream)
    extra = torch.cuda.max_memory_allocated() - before - sum(r.nbytes for r in results.values())
    # Two blocks of logits, a copy of the inputs' size at most, and nothing of the order of tokens x vocabulary.
    assert extra < 2 * tokens * 16_384 * 2 + 4 * tokens * width * 4 + 2 * vocab * width
    assert extra < 0.8 * tokens * vocab * 2


def test_autocast() -> None:
    inputs = problem(64, 5000, 64, dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = solve(inputs)
    assert found["out"].dtype == torch.bfloat16
    assert worst_error(found, solve(inputs, exactly=True)) < 5e-2


@pytest.mark.parametrize(("implementation", "chunk"), [("torch", 2048), ("torch", 300), ("liger", 2048)])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_cross_entropy(implementation: Literal["torch", "liger"], chunk: int, frozen: bool) -> None:
    if implementation == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    hidden = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.1 * torch.randn(32_000, 128, device="cuda")).bfloat16().requires_grad_(not frozen)
    labels = torch.randint(0, 32_000, (1000,), device="cuda")
    labels[::5] = -100
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, implementation=implementation)
    exact = cross_entropy(linear(hidden.double(), weight.double()), labels, reduction="sum")
    assert abs(loss.item() / exact.item() - 1) < 2e-3
    wanted = [hidden] if frozen else [hidden, weight]
    for found, other in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(exact, wanted), strict=True):
        assert (found.double() - other.double()).abs().max() < 3e-2 * other.double().abs().max()


def test_loss_of_no_tokens() -> None:
    hidden = torch.empty(0, 16, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(50, 16, device="cuda", dtype=torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64, device="cuda"))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.count_nonzero() == 0

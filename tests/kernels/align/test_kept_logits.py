"""Logits that the ALIGN operator keeps for its backward pass: the same bits, a product less, gone after it."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alignvlm.kernels import vocab_softmax
from alignvlm.kernels.align import vocab_blocks
from tests.kernels.align.cases import VOCAB_BLOCKS, Products, make_upstream, problem, solve


def _note(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("frozen", [(), ("e",), ("w2", "h"), ("h", "w2", "gamma", "beta")])
def test_kept_logits_change_no_bit(normalize: bool, frozen: tuple[str, ...]) -> None:
    inputs = problem(9, 70, 8, dtype=torch.float32)
    for name in frozen:
        inputs[name].requires_grad_(False)
    options = {"block": 16, "normalize": normalize, **VOCAB_BLOCKS}
    expected, one_block = solve(inputs, **options), 9 * 16 * 4
    for budget, kept in ((one_block - 1, 0), (one_block, 16), (3 * one_block, 48), (10**9, 70)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, sizes), lambda t: t):
            found = solve(inputs, kept_bytes=budget, **options)
        assert sum(size for size in sizes if size in (9 * 16, 9 * 6)) == 9 * kept
        for name, value in expected.items():
            assert torch.equal(found[name], value), (name, budget)


def test_kept_logits_spare_a_product_and_are_only_read() -> None:
    inputs = problem(16, 96, 8)
    unit = 2 * 16 * 96 * 8

    def flops(budget: int) -> int:
        with Products() as counted:
            solve(inputs, block=32, kept_bytes=budget, **VOCAB_BLOCKS)
        return counted.flops

    assert flops(0) - flops(2 * 16 * 32 * 8) == unit * 2 // 3
    out = vocab_softmax(**inputs, block=32, kept_bytes=10**6, **VOCAB_BLOCKS)
    first, second = (
        torch.autograd.grad(out, list(inputs.values()), make_upstream(out), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_kept_logits_do_not_outlive_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, kept = problem(9, 40, 8), list[weakref.ref]()
    original = vocab_blocks._kept_logits

    def remember(*arguments: Any) -> list[torch.Tensor]:
        made = original(*arguments)
        kept.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(vocab_blocks, "_kept_logits", remember)

    def alive() -> int:
        gc.collect()
        return sum(reference() is not None for reference in kept)

    def run() -> torch.Tensor:
        return vocab_softmax(**inputs, block=20, kept_bytes=10**6, **VOCAB_BLOCKS)

    out = run()
    assert (len(kept), alive()) == (2, 2)
    out.sum().backward()
    assert alive() == 0
    out = checkpoint(run, use_reentrant=False)  # keeps nothing, but computes again what keeps them
    assert (len(kept), alive()) == (4, 0)
    out.sum().backward()
    assert (len(kept), alive()) == (6, 0)
    with torch.no_grad():
        run()
    assert len(kept) == 6

"""What is special about the operator in chunks of tokens: how much it computes, keeps and holds."""

from __future__ import annotations

import pytest
import torch

from alignvlm.kernels import vocab_moments, vocab_softmax
from alignvlm.kernels.align import token_chunks
from alignvlm.kernels.align.token_chunks import chunks_of
from tests.kernels.align.cases import TOKEN_CHUNKS, Products, make_upstream, problem, solve, worst_error


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_chunks, "CHUNK", 2)


@pytest.mark.parametrize("num_tokens", range(14))
def test_chunks_cover_all_tokens(num_tokens: int) -> None:
    chunks = chunks_of(num_tokens)
    assert [i for chunk in chunks for i in range(num_tokens)[chunk]] == list(range(num_tokens))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert sizes[-1:] == [min(num_tokens, 4)][: len(sizes)]
    assert all(size == 2 for size in sizes[1:-1])
    assert all(1 <= size <= 2 for size in sizes[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products(dtype: torch.dtype) -> None:
    tokens, vocab, width = 16, 96, 8
    unit = 2 * tokens * vocab * width

    def units(*frozen: str) -> float:
        inputs = problem(tokens, vocab, width, dtype=dtype)
        for name in frozen:
            inputs[name].requires_grad_(False)
        with Products() as counted:
            found = solve(inputs, block=32, **TOKEN_CHUNKS)
        assert found.keys().isdisjoint(frozen)
        exact = {k: v for k, v in solve(inputs, exactly=True).items() if k in found}
        assert worst_error(found, exact) < (1e-5 if dtype == torch.float32 else 1e-9)
        return counted.flops / unit

    # Logits, output; then logits again but for the last of four chunks, dp, dE, dW2, dh; nothing for the statistics.
    assert units() == 2 + 0.75 + 4
    assert units("e") == units("w2") == units("h") == units() - 1
    assert units("h", "w2", "gamma", "beta") == 2 + 0.75 + 1


def test_one_chunk_computes_its_logits_once() -> None:
    tokens, vocab, width = 4, 96, 8
    with Products() as counted:
        solve(problem(tokens, vocab, width), **TOKEN_CHUNKS)
    assert counted.flops == 6 * 2 * tokens * vocab * width


def test_memory_does_not_grow_with_the_tokens() -> None:
    inputs = problem(64, 4096, 4, dtype=torch.float32)
    with Products() as seen:
        solve(inputs, block=128, **TOKEN_CHUNKS)
    assert seen.largest == 4 * 4096 * 4


@pytest.mark.parametrize("frozen", [("w2",), ("h", "w2"), ("e", "gamma"), ("h", "w2", "gamma", "beta")])
def test_frozen_inputs_with_a_smaller_first_chunk(frozen: tuple[str, ...]) -> None:
    inputs = problem(7, 30, 5)
    for name in frozen:
        inputs[name].requires_grad_(False)
    found = solve(inputs, block=8, **TOKEN_CHUNKS)
    assert found.keys() == {"out", *inputs} - set(frozen)
    exact = solve(inputs, exactly=True)
    assert worst_error(found, exact) < 1e-9


def test_a_checkpoint_drops_what_stays_for_the_backward() -> None:
    inputs = problem(9, 40, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = vocab_softmax(**inputs, **TOKEN_CHUNKS)
    assert 40 * 4 in saved  # logits of the last chunk
    assert not any(isinstance(value, torch.Tensor) for value in vars(out.grad_fn).values())


@pytest.mark.parametrize("num_tokens", [4, 11])
def test_second_backward_over_the_same_graph(num_tokens: int) -> None:
    """The saved logits of the last chunk are only read, so the same bits come out again."""
    inputs = problem(num_tokens, 30, 8, dtype=torch.float32)
    out = vocab_softmax(**inputs, **TOKEN_CHUNKS)
    first, second = (
        torch.autograd.grad(out, list(inputs.values()), make_upstream(out), retain_graph=True) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad", [True, False])
def test_given_moments_replace_the_sweep_of_the_statistics(grad: bool) -> None:
    inputs = problem(9, 40, 8)
    moments = vocab_moments(inputs["w2"])
    with torch.set_grad_enabled(grad):
        found = vocab_softmax(**inputs, moments=moments, **TOKEN_CHUNKS)
    torch.testing.assert_close(found, vocab_softmax(**inputs, implementation="reference"))
    if grad:
        exact = solve(inputs, exactly=True)
        assert worst_error(solve(inputs, moments=moments, **TOKEN_CHUNKS), exact) < 1e-9


def test_scale_and_shift_of_another_dtype() -> None:
    inputs = problem(5, 40, 8, dtype=torch.float32)
    for name in ("gamma", "beta"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    found = solve(inputs, **TOKEN_CHUNKS)
    assert found["gamma"].dtype == found["beta"].dtype == torch.bfloat16
    assert worst_error(found, solve(inputs, exactly=True)) < 1e-2

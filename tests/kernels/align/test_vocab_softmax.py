"""The ALIGN operator's sweeps against the obvious lines: values, gradients, numerics, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from alignvlm.kernels import Moments, SharedMoments, vocab_moments, vocab_softmax
from alignvlm.kernels.align import moments as moments_module
from alignvlm.kernels.align import token_chunks, vocab_probabilities
from tests.kernels.align.cases import (
    TOKEN_CHUNKS,
    VOCAB_BLOCKS,
    Products,
    make_upstream,
    problem,
    solve,
    worst_error,
)  # fmt: skip

SWEEPS = pytest.mark.parametrize("sweep", [VOCAB_BLOCKS, TOKEN_CHUNKS], ids=["vocab_blocks", "token_chunks"])
SWEEPS_AND_DTYPES = pytest.mark.parametrize(
    ("sweep", "dtype"), [(VOCAB_BLOCKS, torch.float32), (VOCAB_BLOCKS, torch.bfloat16), (TOKEN_CHUNKS, torch.float32)]
)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Several chunks in small problems."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_chunks, "CHUNK", 2)
        yield


@SWEEPS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(normalize: bool, affine: bool, sweep: dict) -> None:
    inputs = problem(6, 7, 4, gamma=affine, beta=affine)
    names = [name for name, value in inputs.items() if value is not None]

    def call(*values: torch.Tensor) -> torch.Tensor:
        return vocab_softmax(**dict(zip(names, values, strict=True)), normalize=normalize, block=3, **sweep)

    assert torch.autograd.gradcheck(call, [inputs[name] for name in names])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 12)),
    block=st.integers(1, 41),
    flags=st.tuples(*[st.booleans()] * 3),
)
@SWEEPS
def test_any_shape(shape: tuple[int, int, int], block: int, flags: tuple[bool, bool, bool], sweep: dict) -> None:
    gamma, beta, normalize = flags
    inputs = problem(*shape, gamma=gamma, beta=beta)
    options = {"normalize": normalize}
    found = solve(inputs, block=block, **options, **sweep)
    for name, exact in solve(inputs, exactly=True, **options).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("width", [200, 401])  # wide enough for the symmetric product in pieces
def test_wide_hidden_states(width: int) -> None:
    inputs = problem(5, 50, width)
    assert worst_error(solve(inputs, block=16, **VOCAB_BLOCKS), solve(inputs, exactly=True)) < 1e-9


# 40: a spread of logits that leaves one token with nearly all the mass; 0: the flat start of a training.
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
@pytest.mark.parametrize(
    ("sweep", "dtype", "bound"),
    [
        (TOKEN_CHUNKS, torch.float32, 1e-5),
        (VOCAB_BLOCKS, torch.float32, 1e-5),
        (VOCAB_BLOCKS, torch.bfloat16, 2e-2),
        (VOCAB_BLOCKS, torch.float16, 2e-3),
    ],
)
def test_full_vocabulary(sweep: dict, dtype: torch.dtype, bound: float, scale: float) -> None:
    inputs = problem(6, 128_256, 8, dtype=dtype, scale=scale)
    found, exact = solve(inputs, **sweep), solve(inputs, exactly=True)
    eager = solve(inputs, implementation="reference")
    for name, value in exact.items():
        # Means of 128K random rows and sharp softmaxes cancel: there eager PyTorch's own error is the measure.
        allowed = max(bound, 3 * worst_error({name: eager[name]}, {name: value}))
        assert worst_error({name: found[name]}, {name: value}) < allowed, name


@SWEEPS
def test_one_token_holds_the_mass(sweep: dict) -> None:
    inputs = problem(4, 500, 16, dtype=torch.float32, beta=False, gamma=False)
    with torch.no_grad():
        inputs["h"].copy_(inputs["w2"][:4])
        for _ in range(200):
            p = vocab_probabilities(inputs["h"].double(), inputs["w2"].double(), normalize=False)
            inputs["h"][p.amax(dim=1) < 0.999] *= 1.03
    assert ((p.amax(dim=1) > 0.999) & (p.amax(dim=1) < 0.9999)).all()
    exact = solve(inputs, exactly=True, normalize=False)
    found = solve(inputs, normalize=False, block=64, **sweep)
    eager = solve(inputs, normalize=False, implementation="reference")
    assert worst_error({"out": found["out"]}, {"out": exact["out"]}) < 1e-5
    # p (dp - delta) nearly cancels here, so fp32 keeps three digits less.
    assert worst_error(found, exact) < max(1e-4, 10 * worst_error(eager, exact))


@SWEEPS_AND_DTYPES
@pytest.mark.parametrize("normalize", [True, False])
def test_large_magnitudes(sweep: dict, dtype: torch.dtype, normalize: bool) -> None:
    inputs = problem(5, 300, 16, dtype=dtype)
    with torch.no_grad():
        inputs["h"] *= 1e4
        inputs["w2"] *= 1e3
    for value in solve(inputs, normalize=normalize, block=64, **sweep).values():
        assert torch.isfinite(value).all()


@SWEEPS
def test_masked_tokens(sweep: dict) -> None:
    inputs = problem(3, 20, 4)
    with torch.no_grad():
        inputs["beta"][:9] = -torch.inf  # whole blocks, the first included
    found, exact = solve(inputs, block=4, **sweep), solve(inputs, exactly=True)
    assert worst_error({"out": found["out"]}, {"out": exact["out"]}) < 1e-12
    assert worst_error({"e": found["e"]}, {"e": exact["e"]}) < 1e-12
    assert found["e"][:9].count_nonzero() == 0


@SWEEPS_AND_DTYPES
def test_two_runs_agree_bit_for_bit(sweep: dict, dtype: torch.dtype) -> None:
    inputs = problem(33, 700, 24, dtype=dtype)
    first, second = (solve(inputs, block=128, **sweep) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frozen_weights_skip_their_products() -> None:
    tokens, vocab, width = 16, 96, 8
    unit = 2 * tokens * vocab * width

    def flops(*frozen: str) -> int:
        inputs = problem(tokens, vocab, width)
        for name in frozen:
            inputs[name].requires_grad_(False)
        moments = vocab_moments(inputs["w2"])
        with Products() as counted:
            found = solve(inputs, block=32, moments=moments, **VOCAB_BLOCKS)
        assert found.keys().isdisjoint(frozen)
        assert worst_error(found, {k: v for k, v in solve(inputs, exactly=True).items() if k in found}) < 1e-9
        return counted.flops

    every, extra = flops(), 2 * vocab * width * width  # extra: W2's share of the LayerNorm statistics
    small = 10 * 2 * tokens * width * width
    assert 7 * unit + extra <= every < 7 * unit + extra + small
    assert every - flops("e") == unit
    assert unit + extra <= every - flops("w2") < unit + extra + small
    assert 4 * unit <= flops("w2", "e", "gamma", "beta") - unit < 4 * unit + small  # z twice, out, dp, dh
    assert flops("h", "w2", "gamma", "beta") < 4 * unit + small  # z twice, out, dE


def test_never_more_than_tokens_times_block() -> None:
    inputs = problem(64, 4096, 4, dtype=torch.float32)
    with Products() as seen:
        solve(inputs, block=128, **VOCAB_BLOCKS)
    assert seen.largest <= 4 * max(64 * 128, 4096 * 4)


@SWEEPS
def test_tied_embedding_used_twice(sweep: dict) -> None:
    inputs, text = problem(5, 30, 8), torch.randn(4, 8, dtype=torch.float64)

    def gradient(options: dict) -> torch.Tensor:
        e = inputs["e"].detach().requires_grad_()
        out = vocab_softmax(**{**inputs, "e": e}, **options)
        loss = (text @ e.T).logsumexp(-1).sum() + (out * out).sum() + (e[3] * out[0]).sum()
        return torch.autograd.grad(loss, e)[0]

    torch.testing.assert_close(gradient(sweep), gradient({"implementation": "reference"}))


@SWEEPS
def test_strided_inputs(sweep: dict) -> None:
    inputs = {
        "h": torch.randn(8, 6, dtype=torch.float64).T,
        "w2": torch.randn(40, 8, dtype=torch.float64)[::2],
        "e": torch.randn(8, 20, dtype=torch.float64).T,
        "gamma": torch.randn(40, dtype=torch.float64)[::2],
        "beta": torch.randn(1, dtype=torch.float64).expand(20),
    }
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    strided_upstream = torch.randn(8, 6, dtype=torch.float64).T
    assert not any(value.is_contiguous() for value in (*inputs.values(), strided_upstream))
    out = vocab_softmax(**inputs, block=8, **sweep)
    expected = vocab_softmax(**inputs, implementation="reference")
    torch.testing.assert_close(out, expected)
    for one, other in zip(
        torch.autograd.grad(out, list(inputs.values()), strided_upstream),
        torch.autograd.grad(expected, list(inputs.values()), strided_upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@SWEEPS
def test_checkpointing(sweep: dict) -> None:
    inputs = problem(7, 40, 8, dtype=torch.float32)
    direct = solve(inputs, block=16, **sweep)
    values = {k: None if v is None else v.detach().requires_grad_() for k, v in inputs.items()}
    out = checkpoint(lambda: vocab_softmax(**values, block=16, **sweep), use_reentrant=False)
    out.backward(make_upstream(out))
    for name, value in values.items():
        if value is not None:
            assert torch.equal(value.grad, direct[name]), name


def test_autocast() -> None:
    inputs = problem(7, 40, 8, dtype=torch.float32)
    rounded = {k: v if v is None or k in ("gamma", "beta") else v.bfloat16() for k, v in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve(inputs, block=16, **VOCAB_BLOCKS)
    assert found["out"].dtype == torch.bfloat16
    assert all(found[k].dtype == torch.float32 for k in found if k != "out")
    exact = solve({k: None if v is None else v.detach().requires_grad_() for k, v in rounded.items()}, exactly=True)
    assert worst_error(found, exact) < 2e-2


@SWEEPS
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int, sweep: dict) -> None:
    inputs = problem(num_tokens, 30, 4)
    found = solve(inputs, block=8, **sweep)
    assert found["out"].shape == (num_tokens, 4)
    assert worst_error(found, solve(inputs, exactly=True)) < 1e-9


@SWEEPS
def test_inference_sweeps_its_statistics(sweep: dict) -> None:
    inputs = problem(3, 5000, 16)  # N < D: no moments of W2
    with torch.no_grad():
        found = vocab_softmax(**inputs, **sweep)
    torch.testing.assert_close(found, vocab_softmax(**inputs, implementation="reference"))


@pytest.mark.parametrize(
    ("dtype", "options", "chosen"),
    [
        (torch.float32, {}, "TokenChunksBackward"),
        (torch.float64, {"block": 8}, "TokenChunksBackward"),
        (torch.bfloat16, {}, "VocabBlocksBackward"),
    ],
)
def test_choice_on_a_cpu(dtype: torch.dtype, options: dict[str, float], chosen: str) -> None:
    inputs = {name: value.to(dtype) for name, value in problem(10, 40, 16).items() if value is not None}
    inputs["h"].requires_grad_()
    assert type(vocab_softmax(**inputs, **options).grad_fn).__name__ == chosen


def test_moments_are_reused() -> None:
    inputs = problem(5, 40, 8)
    moments = vocab_moments(inputs["w2"])
    for name, value in solve(inputs, block=16, moments=moments, **VOCAB_BLOCKS).items():
        assert torch.equal(value, solve(inputs, block=16, **VOCAB_BLOCKS)[name]), name


def test_shared_moments_are_computed_once_and_gradients_pass_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[torch.Size] = []
    original = moments_module.vocab_moments
    monkeypatch.setattr(moments_module, "vocab_moments", lambda w2: computed.append(w2.shape) or original(w2))
    shared = SharedMoments()
    for seed in range(3):  # micro-batches of one step
        inputs = problem(5, 40, 8, seed=seed) | {"w2": problem(5, 40, 8)["w2"]}
        for name, value in solve(inputs, block=16, moments=shared, **VOCAB_BLOCKS).items():
            assert torch.equal(value, solve(inputs, block=16, **VOCAB_BLOCKS)[name]), name
    assert len(computed) == 1
    solve(inputs, moments=SharedMoments(), **TOKEN_CHUNKS)  # has no use for them
    assert len(computed) == 1
    with pytest.raises(ValueError, match="moments belong to a width of 8"):
        solve(problem(5, 40, 6), moments=shared, **VOCAB_BLOCKS)
    shared = SharedMoments()  # of the next step
    changed = inputs | {"w2": (2 * inputs["w2"]).detach().requires_grad_()}
    assert worst_error(solve(changed, moments=shared, **VOCAB_BLOCKS), solve(changed, exactly=True)) < 1e-9


def test_a_row_is_added_to_every_row_with_one_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, row = torch.randn(50, 24, generator=generator).bfloat16(), torch.randn(24, generator=generator)
    exact = matrix.double() + row.double()
    moments_module._add_row(matrix, row)
    assert ((matrix.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-14).all()


@SWEEPS
def test_part_of_a_vocabulary_with_the_statistics_of_all(sweep: dict) -> None:
    full, kept = problem(5, 60, 8), torch.tensor([50, 3, 7, 20, 21])
    whole = vocab_moments(full["w2"])
    moments = Moments(whole.mean, whole.covariance, constant=True)
    part = {k: v if k == "h" else v.detach()[kept].requires_grad_() for k, v in full.items()}
    p = vocab_probabilities(full["h"], full["w2"], full["gamma"], full["beta"])[:, kept]
    restricted = p / p.sum(dim=1, keepdim=True)
    found = solve(part, block=2, moments=moments, **sweep)
    torch.testing.assert_close(found["out"], (restricted @ part["e"]).detach())
    (grad_h,) = torch.autograd.grad(restricted @ part["e"], full["h"], make_upstream(found["out"]))
    torch.testing.assert_close(found["h"], grad_h)

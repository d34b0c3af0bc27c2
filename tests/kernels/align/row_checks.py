"""Checks of the Triton implementation at odd shapes: `python -m tests.kernels.align.row_checks` runs them interpreted.

Triton decides at import time whether it interprets, so CPU tests start this in a process of its own.
"""

from __future__ import annotations

import itertools
import sys

import torch

from alignvlm.kernels import SharedMoments
from tests.kernels.align.cases import problem, solve, worst_error

SHAPES = ((1, 1, 1, 1), (2, 16, 4, 16), (5, 37, 3, 16), (131, 17, 8, 1024), (3, 523, 2, 1024))
"""Tokens, vocabulary, width, block: one, primes, powers of two, just off the kernels' tiles of 128 x 512."""


def check_shapes(device: str) -> None:
    """All combinations of optional parts, against the float64 reference."""
    for *shape, block in SHAPES:
        for gamma, beta, normalize in itertools.product((True, False), repeat=3):
            if shape[1] != 37 and not (gamma and beta and normalize):
                continue
            inputs = problem(*shape, dtype=torch.float32, device=device, gamma=gamma, beta=beta)
            options = {"normalize": normalize, "block": block}
            found = solve(inputs, implementation="triton", **options)
            exact = solve(inputs, exactly=True, normalize=normalize)
            eager = solve(inputs, implementation="reference", normalize=normalize)
            error, eager_error = worst_error(found, exact), worst_error(eager, exact)
            assert error < max(5e-5, 20 * eager_error), (shape, options, gamma, beta, error)


def check_bfloat16(device: str) -> None:
    """bf16 operands and probabilities, fp32 statistics."""
    inputs = problem(37, 211, 16, dtype=torch.bfloat16, device=device, scale=2.0)
    error = worst_error(solve(inputs, implementation="triton", block=64), solve(inputs, exactly=True))
    assert error < 3e-2, error


def check_frozen(device: str) -> None:
    """Only E, or everything but E, or only gamma and beta learn."""
    for learning in (("e",), ("h", "w2", "gamma", "beta"), ("gamma", "beta"), ("h",)):
        inputs = problem(9, 40, 8, dtype=torch.float32, device=device)
        for name, value in inputs.items():
            if value is not None:
                value.requires_grad_(name in learning)
        found = solve(inputs, implementation="triton", block=16)
        assert found.keys() == {"out", *learning}
        assert worst_error(found, solve(inputs, exactly=True)) < 2e-5, learning


def check_extremes(device: str) -> None:
    """Masked blocks, large logits, rising maxima, repeatability."""
    inputs = problem(6, 64, 4, dtype=torch.float32, device=device, scale=30.0)
    with torch.no_grad():
        inputs["beta"][:20] = -torch.inf
        inputs["beta"][40:] += 60  # the running maximum must move after the first blocks
    found = solve(inputs, implementation="triton", block=8)
    assert worst_error({"out": found["out"]}, {"out": solve(inputs, exactly=True)["out"]}) < 1e-5
    for name, value in solve(inputs, implementation="triton", block=8).items():
        assert torch.equal(value, found[name]), name
    with torch.no_grad():
        inputs["h"] *= 1e6
    assert all(torch.isfinite(v).all() for k, v in solve(inputs, implementation="triton", block=8).items() if k != "h")


def check_kept_logits(device: str) -> None:
    """The same bits, whether logits are kept or computed again, and from moments that are shared."""
    inputs = problem(21, 83, 16, dtype=torch.bfloat16, device=device)
    options = {"implementation": "triton", "block": 32}
    expected = solve(inputs, **options)
    for budget in (21 * 32 * 2, 10**6):
        found = solve(inputs, kept_bytes=budget, moments=SharedMoments(), **options)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), budget


CHECKS = (check_shapes, check_bfloat16, check_frozen, check_extremes, check_kept_logits)

if __name__ == "__main__":
    for check in CHECKS:
        if len(sys.argv) == 1 or check.__name__ in sys.argv[1:]:
            check("cpu")
            print(check.__name__, "passed")

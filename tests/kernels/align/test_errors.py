"""Arguments that the ALIGN operator refuses: the error names them."""

from __future__ import annotations

import pytest
import torch

from alignvlm.kernels import vocab_moments, vocab_softmax


def matrices(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size, 4, dtype=dtype) for name, size in (("h", 3), ("w2", 10), ("e", 10))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3)}, "h must have two dimensions"),
        ({"w2": torch.zeros(10, 5)}, "w2 must be"),
        ({"w2": torch.zeros(10, 4, dtype=torch.float64)}, "w2 is torch.float64"),
        ({"w2": torch.zeros(10, 4, dtype=torch.int64)}, "w2 must be floating"),
        ({"w2": torch.zeros(0, 4), "e": torch.zeros(0, 4)}, "w2 has no rows"),
        ({"e": torch.zeros(9, 4)}, "e has 9 rows"),
        ({"e": torch.zeros(10, 4, device="meta")}, "e is on meta"),
        ({"gamma": torch.zeros(9)}, "gamma must be"),
        ({"beta": torch.zeros(10, 1)}, "beta must be"),
        ({"gamma": torch.zeros(10, dtype=torch.int64)}, "gamma must be floating"),
        ({"gamma": torch.zeros(10, device="meta")}, "gamma is on meta"),
        ({"eps": -1.0}, "eps"),
        ({"block": 0}, "block"),
        ({"kept_bytes": -1}, "kept_bytes"),
        ({"implementation": "fast"}, "implementation must be one of reference, token_chunks, vocab_blocks, triton"),
        (
            {**matrices(torch.bfloat16), "implementation": "token_chunks"},
            "implementation 'token_chunks' takes torch.float64",
        ),
        ({**matrices(torch.float16), "implementation": "triton"}, "implementation 'triton' takes torch.float32"),
        ({"moments": vocab_moments(torch.zeros(10, 5))}, "moments"),
        ({"moments": vocab_moments(torch.zeros(10, 4)), "normalize": False}, "moments"),
        ({"moments": vocab_moments(torch.zeros(10, 4)), "implementation": "reference"}, "moments"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {"h": torch.zeros(3, 4), "w2": torch.zeros(10, 4), "e": torch.zeros(10, 4)}
    with pytest.raises(ValueError, match=f"^(implementation .*)?{message}"):
        vocab_softmax(**(arguments | change))

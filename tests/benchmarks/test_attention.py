"""`benchmarks/attention.py`: what makes it fail; tests/test_gpu_check.py has its tiny run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.checkout import ROOT


@pytest.mark.parametrize(
    ("row", "is_wrong"),
    [
        ({"errors": {"out": 3e-3, "query": 4e-3}}, False),
        ({"errors": {"out": 3e-3, "query": 2e-2}}, True),
        ({"errors": {"out": 3e-3, "query": float("nan")}}, True),
        ({"failed": "ValueError: model.attention = 'flash' needs the flash-attn package"}, False),
        ({"failed": "RuntimeError: CUDA error"}, True),
    ],
)
def test_a_wrong_result_is_a_failure(row: dict[str, Any], is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert import_module("attention").is_wrong(row) is is_wrong

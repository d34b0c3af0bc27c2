"""The numbers of benchmarks/softmax/flatness.py where they are known beforehand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alignvlm.connectors import AlignConnector, AlignOptions, Sizes
from tests.checkout import ROOT


@pytest.fixture
def flatness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "softmax"))
    return __import__("flatness")


@torch.no_grad()
def test_a_flat_softmax_is_linear_and_a_sharp_one_is_single_embeddings(flatness: Any) -> None:
    torch.manual_seed(0)
    connector = AlignConnector(AlignOptions(), Sizes(16, 32, 400, 2))
    embedding = torch.randn(400, 32)
    connector.start_from(embedding, torch.randn(400, 32))
    features, found = torch.randn(60, 16), {}
    for gain in (0.05, 12.0):
        connector.gamma.fill_(gain)
        found[gain] = flatness.measure(connector, features, embedding)
    flat, sharp = found[0.05], found[12.0]
    assert flat["entropy"] == pytest.approx(math.log(400) - 0.05**2 / 2, abs=1e-3)
    assert flat["linear part"] > 0.99 > 0.91 > flat["tokens with 0.9 of the mass"] / 400 > 0.85
    assert flat["shared by all"] > 0.5 > sharp["shared by all"]
    assert sharp["largest probability"] > 0.8 > 0.3 > sharp["linear part"]
    assert sharp["entropy"] < 0.6
    assert sharp["rms of a visual token"] == pytest.approx(flatness.rms(embedding), rel=0.2)
    assert sharp["tokens with 0.9 of the mass"] <= 60

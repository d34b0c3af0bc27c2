"""The modules of benchmarks/streaming, which import each other by their names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.checkout import ROOT

FOLDER = ROOT / "benchmarks" / "streaming"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports one of them."""
    for folder in (FOLDER.parent, FOLDER, FOLDER / "readers"):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load

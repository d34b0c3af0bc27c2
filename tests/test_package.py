"""The package's face: every public name is there, and importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import alignvlm
from tests.checkout import ROOT

HEAVY = {"torch", "deepspeed", "transformers", "mlflow", "numpy", "data_pipeline"}


def test_every_public_name_is_there_and_others_are_not() -> None:
    others = [name for name in alignvlm.__all__ if getattr(alignvlm, name).__name__ != name]
    assert others == ["register_connector"]
    assert set(alignvlm.__all__) <= set(dir(alignvlm))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        alignvlm.trian  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, alignvlm; alignvlm.__version__; dir(alignvlm); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "alignvlm" in loaded.stdout.split()
    assert not HEAVY & set(loaded.stdout.split())

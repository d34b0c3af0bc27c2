"""The Python code of README and docs/connector.md runs; other pages have tests of their own, beside what they show."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import alignvlm
from alignvlm.kernels.align.reference import vocab_softmax_reference
from tests.checkout import ROOT


def code_of(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readme_trains_the_recipe_that_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(alignvlm, "train", lambda recipe, callbacks: trained.append((recipe, callbacks)))
    (code,) = code_of("README.md")
    exec(compile(code, "README.md", "exec"), {})
    ((recipe, callbacks),) = trained
    assert (recipe.name, recipe.stages["connector"].max_steps, list(callbacks)) == ("quickstart", 20, [])


def test_the_operator_is_called_as_the_page_about_connectors_shows() -> None:
    """Every call gives what the plain formula gives."""
    torch.manual_seed(0)
    h, w2, e = torch.randn(5, 8), torch.randn(300, 8), torch.randn(300, 6)
    given = {"h": h, "w2": w2, "e": e, "gamma": torch.randn(300), "beta": torch.randn(300)}
    (code,) = code_of("docs/connector.md")
    wanted = vocab_softmax_reference(**given)
    lines = code.splitlines()
    names: dict[str, Any] = dict(given)
    for line in lines:
        exec(compile(line, "docs/connector.md", "exec"), names)
        if "gamma" in line:
            torch.testing.assert_close(names["out"], wanted, rtol=1e-5, atol=1e-5)
        elif "normalize=False" in line:
            plain = vocab_softmax_reference(h, w2, e, normalize=False)
            torch.testing.assert_close(names["out"], plain, rtol=1e-5, atol=1e-5)

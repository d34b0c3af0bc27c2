"""The code of docs/transformers.md, run from top to bottom on a tiny export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ROOT
from tests.tiny import picture, tiny_model


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    export = tmp_path / "runs" / "quickstart" / "3-instruct" / "export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    picture(70, 40).save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    answers, batches = [], []
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), names)
        answers.append(names.get("answer"))
        batches.append(names.get("inputs"))
    assert answers[1] == answers[2] != ""
    hello = processor.prepare_generation([[{"role": "user", "content": "Hello"}]], [[]])
    assert batches[3]["attention_mask"].sum(1).tolist() == [len(row["input_ids"][0]) for row in (batches[1], hello)]
    assert len(batches[1]["pixel_values"]) == processor.spec.num_tiles(70, 40) > len(batches[4]["pixel_values"]) == 1

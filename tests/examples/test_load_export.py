"""`examples/load_export.py` on a tiny export: a process of its own answers as this one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from tests.jobs import ROOT, job_environment
from tests.tiny import picture, tiny_model


@pytest.mark.slow
def test_it_prints_the_answer_of_the_model(tmp_path: Path) -> None:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    image, question = picture(70, 40), "what is the total"
    image.save(tmp_path / "page.png")
    words = [tmp_path / "export", tmp_path / "page.png", question, "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "load_export.py", *words], cwd=tmp_path, env=job_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = [{"type": "image"}, {"type": "text", "text": question}]
    item = Item("k", 0, question, ["12"], [{"role": "user", "content": content}], [image])
    (answer,) = ModelAnswerer(model, processor, "cpu").answer([item], 6)
    assert answer
    assert done.stdout.strip() == answer

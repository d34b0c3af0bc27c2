"""docs/data.md as a newcomer follows it: its recipe, and its commands one after the other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.data_pipeline.published import published_desk
from tests.jobs import ROOT, job_environment

PAGE = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what the page starts from: images and conversations, in the page's own form."""
    (example,) = blocks("json")
    row = json.loads(example)
    (tmp_path / "images").mkdir()
    for name, numbers in (("train", range(40)), ("heldout", range(40, 44))):
        lines = []
        for number in numbers:
            image = Image.new("RGB", (100, 60), "white")
            ImageDraw.Draw(image).text((10, 20), str(number), "black")
            image.save(tmp_path / "images" / f"{number}.png")
            question, answer = row["messages"]
            lines.append(
                {**row, "messages": [question, {**answer, "content": str(number)}], "images": [f"{number}.png"]}
            )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (recipe,) = (block for block in blocks("yaml") if block.startswith("name: mine\n"))
    published_desk(tmp_path)
    (tmp_path / "mine.yaml").write_text(recipe)
    return tmp_path


def test_the_page_about_your_own_data_works_as_written(desk: Path) -> None:
    program = f"alignvlm() {{ '{sys.executable}' -m alignvlm \"$@\"; }}\nset -e\n"
    outputs = []
    for commands in blocks("sh"):
        done = subprocess.run(
            ["bash", "-c", program + commands], cwd=desk, env=job_environment(), text=True, timeout=300,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{commands}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout
        outputs.append(done.stdout)
    written, indexed, published, shared, planned, trained = outputs
    assert "data/mine: 40 samples in 1 shards" in written
    assert "data/copied: 40 samples" in indexed
    assert "data/mine: OK" in indexed
    assert "data/llava: 5 samples in 1 shards" in published
    assert "data/many: 2 samples in 1 shards" in shared
    assert "data/mine: OK" in planned
    assert "the plans are the same" in planned
    assert (desk / "mine-instruct-0.html").exists()
    assert "finished: runs/mine" in trained
    assert "heldout" in trained

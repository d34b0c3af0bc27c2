"""docs/data.md, datasets.md and storage.md as a newcomer follows them: the recipe, and one command after the other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from data_pipeline.files import read_json_lines
from data_pipeline.stores import helper
from tests.data_pipeline.published import published_desk
from tests.documents.commands import lines_of
from tests.fixtures.command import Command
from tests.jobs import ROOT, TINY, run
from tests.stores.faults import Faults
from tests.stores.servers import CREDENTIALS, MemoryS3, serve_memory

PAGES = "".join((ROOT / "docs" / name).read_text() for name in ("data.md", "datasets.md", "storage.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what the pages start from: images and conversations, in the form of data.md."""
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


@pytest.fixture
def bucket(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryS3]:
    """A bucket behind 30 ms, in the environment that finds it; in the folder of `desk`."""
    monkeypatch.chdir(desk)
    memory = MemoryS3()
    with serve_memory(memory, Faults(latency=0.03)) as endpoint:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "ALIGNVLM_CACHE": str(desk / "cache")}.items():
            monkeypatch.setenv(name, value)
        helper.stop()
        yield memory
        helper.stop()


def test_the_pages_about_data_work_as_written(
    desk: Path, bucket: MemoryS3, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line as a shell would; a training is a process of its own, the others spare themselves the imports."""

    def typed(commands: str) -> str:
        output = ""
        for text in commands.splitlines():
            program, *words = shlex.split(text)
            if program == "export":
                monkeypatch.setenv(*words[0].split("=", 1))
                continue
            assert program == "alignvlm", text
            *words, file = (*words[:-2], words[-1]) if ">" in words else (*words, "")
            trains = words[0] == "train" and "--dry-run" not in words
            printed = run(*words, cwd=desk) if trains else command(*words)
            assert "Traceback" not in printed
            if file:
                Path(file).write_text(printed)
            else:
                output += printed
        return output

    outputs = []
    for commands in blocks("sh"):
        short = commands.replace("name=far", "name=far stages.instruct=null evaluation.tasks={}")
        outputs.append(typed(short))
        if len(outputs) == 1:  # what was written is in the bucket too
            for tar in (desk / "data").rglob("*.tar"):
                bucket.objects[f"bucket/corpus/{tar.relative_to(desk / 'data').as_posix()}"] = tar.read_bytes()
    written, indexed, planned, trained, published, shared, far = outputs
    assert "data/mine: 40 samples in 1 shards" in written
    assert "data/copied: 40 samples" in indexed
    assert "data/mine: OK" in indexed
    assert "data/llava: 5 samples in 1 shards" in published
    assert "data/many: 2 samples in 1 shards" in shared
    assert "s3://bucket/corpus/mine: OK" in far
    assert "requests/s and" in far
    assert "data/mine: OK" in planned
    assert "the plans are the same" in planned
    assert (desk / "mine-instruct-0.html").exists()
    assert "finished: runs/mine" in trained
    assert "heldout" in trained
    same_from_a_bucket(desk, far, CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
    named = [line.text for line in lines_of(PAGES) if not line.whole and "s3://bucket/" in line.text]
    published, generated = (text for text in named if text.startswith("alignvlm data write"))
    assert "s3://bucket/corpus/finevision: 2 samples" in typed(published)
    few = [f"data.sources.{name}.generator_args.num_samples=3" for name in ("fields", "charts")]
    said = typed(generated.replace("RECIPE", shlex.join([str(TINY), *few])))
    assert "test: 6 samples in 1 shards, s3://bucket/corpus/test" in said


def same_from_a_bucket(desk: Path, output: str, secret: str) -> None:
    """The run from the bucket has the losses of the one from disk, and no file or line of it the secret."""
    losses = [
        [row["loss"] for row in read_json_lines(desk / "runs" / name / "metrics.jsonl") if row["stage"] == "connector"]
        for name in ("far", "mine")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert (desk / "data" / "fetched" / "000000.tar").read_bytes() == (desk / "data/mine/000000.tar").read_bytes()
    assert secret not in output
    files = [path for path in (desk / "runs").rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == []

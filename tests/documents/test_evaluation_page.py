"""The commands of docs/evaluation.md and benchmarks.md run as they stand, beside a tiny export and tiny files.

The model says `a`. Exports of checkpoints are in tests/integration/test_bf16.py, harnesses in tests/harness and
tests/evaluation.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from alignvlm.evaluation.answering import ModelAnswerer
from data_pipeline.shards.writer import write_shards
from tests.checkout import ROOT
from tests.documents.commands import lines_of
from tests.evaluation.benchmarks.files import Known
from tests.evaluation.benchmarks.test_suite import nine
from tests.fixtures.command import Command
from tests.fixtures.made_up_run import write_run
from tests.tiny import conversation, picture, tiny_model

PAGES = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("evaluation.md", "benchmarks.md"))
SENTENCES = ("eval RECIPE", "report RUN", "score --vectors FILE")
"""Commands inside sentences that have all of their arguments."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with everything that the pages name under the name that it has there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelAnswerer, "load", lambda folder, device=None: Known(defaultdict(lambda: "a")))
    write_run(tmp_path / "RUN", steps_per_stage=2)
    for part in tiny_model():
        part.save_pretrained("EXPORT")
        part.save_pretrained("runs/mine/1-connector/export")
    nine(Path("FOLDER"))
    Path("PATH").symlink_to("FOLDER/docvqa")
    Path("FILE").symlink_to(ROOT / "tests" / "metrics" / "evaluator_cases.json")
    rows = [{"key": f"k{n}", "messages": conversation("q", "a", 1), "images": [picture(32, 32)]} for n in range(3)]
    write_shards(iter(rows), tmp_path / "data" / "held-out")
    config = {
        "name": "mine",
        "model": {
            "vision": {"config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}},
            "language": {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": 320}},
        },
        "data": {"sources": {"read": {"path": "read"}, "held-out": {"path": "held-out"}}},
        "stages": {"connector": {"mixture": {"read": 1}, "lr": {"default": 1e-3}, "deepspeed": "cpu_zero3"}},
        "evaluation": {"tasks": {"fields": {"source": "held-out"}}},
        "train": {"precision": "fp32", "deepspeed": "cpu_zero3"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    reply = {"index": 0, "id": "v1_0", "reply": "a", "gold": {"answer": "a", "capability": "ocr"}}
    Path("benchmarks").mkdir()
    Path("benchmarks/mmvet.jsonl").write_text(json.dumps(reply) + "\n")
    Path("judge.json").write_text('{"v1_0": 0.5}')
    return tmp_path


def test_every_command_of_the_pages_runs(desk: Path, command: Command) -> None:
    lines = [line for line in lines_of(PAGES) if line.program == "alignvlm"]
    whole = [line.words for line in lines if line.whole and line.words[0] != "export"]
    named = [line.words for line in lines if not line.whole and " ".join(line.words) in SENTENCES]
    assert (len(whole), len(named)) == (4, 4)
    typed = {" ".join(words): [{"RECIPE": "mine.yaml"}.get(word, word) for word in words] for words in (*whole, *named)}
    printed = {text: command(*words) for text, words in typed.items()}
    results = json.loads(Path("benchmarks/results.json").read_text())["benchmarks"]
    assert (results["docvqa"]["score"], len(results)) == (100.0, 9)
    assert "50.00" in printed["score benchmarks/mmvet.jsonl --judge judge.json"]
    assert "| ALIGN (published) |" in printed["eval EXPORT --suite paper --data FOLDER"]
    tasks = json.loads(Path("runs/mine/1-connector/evaluation/results.json").read_text())["tasks"]
    assert tasks["fields"]["items"] == 3
    agreed, total = printed["score --vectors FILE"].splitlines()[-1].split(" of ")
    assert int(agreed) == int(total) > 100

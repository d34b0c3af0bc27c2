"""`alignvlm report` and `alignvlm eval` as a person calls them, with a tiny real export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from alignvlm.cli import evaluate as eval_command
from alignvlm.cli import report as report_command
from alignvlm.errors import UserError
from data_pipeline.shards.writer import write_shards
from tests.tiny import picture, tiny_model


def call(module: object, *line: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())  # type: ignore[attr-defined]
    arguments = parser.parse_args(line)
    return int(arguments.handler(arguments))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with one held-out source, its run with the export of stage 1, as the working directory."""
    monkeypatch.chdir(tmp_path)
    record = {"images": [picture(32, 32)], "task": "fields", "answers": ["12"]}
    messages = [{"role": "user", "content": "<image>read the field"}, {"role": "assistant", "content": "12"}]
    records = ({**record, "key": f"k{i}", "messages": messages} for i in range(5))
    write_shards(records, tmp_path / "data" / "fields_test")
    config = {
        "name": "tiny",
        "model": {
            "vision": {"config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}},
            "language": {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": 320}},
        },
        "data": {"sources": {"read": {"path": "read"}, "fields_test": {"path": "fields_test"}}},
        "stages": {"connector": {"mixture": {"read": 1}, "lr": {"default": 1e-3}, "deepspeed": "cpu_zero3"}},
        "evaluation": {"tasks": {"fields": {"source": "fields_test", "max_new_tokens": 3}}, "batch_size": 2},
        "train": {"precision": "fp32", "deepspeed": "cpu_zero3"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    model, processor = tiny_model()
    export = tmp_path / "runs" / "tiny" / "1-connector" / "export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path / "tiny.yaml"


def test_eval_of_a_recipe_and_its_report(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(eval_command, "eval", str(recipe)) == 0
    printed = capsys.readouterr().out
    assert "fields" in printed
    assert "exact match" in printed
    folder = recipe.parent / "runs" / "tiny" / "1-connector" / "evaluation"
    assert json.loads((folder / "results.json").read_text())["tasks"]["fields"]["items"] == 5
    views = list((folder / "gallery").glob("*.vocabulary.json"))
    assert len(views) == 2
    assert call(report_command, "report", "runs/tiny") == 0
    page = Path(capsys.readouterr().out.split()[-1])
    assert page.read_text().count('class="overlay"') == 2


def test_eval_of_an_export_folder_uses_its_runs_recipe(recipe: Path) -> None:
    assert call(eval_command, "eval", "runs/tiny/1-connector/export", "--limit", "2") == 0
    results = json.loads(Path("runs/tiny/1-connector/evaluation-2/results.json").read_text())
    assert results["tasks"]["fields"]["items"] == 2


def test_mistakes_say_the_way_out(recipe: Path) -> None:
    export = "runs/tiny/1-connector/export"
    for line, message in (
        ((str(recipe), "--stage", "init"), "no export yet"),
        ((str(recipe), "--stage", "conector"), "known: init, connector"),
        ((str(recipe), "runs=elsewhere"), "train it first"),
        (("runs/tiny",), "no export folder"),
        ((export, "--limit", "0"), "at least 1"),
        ((export, "--task", "field"), "did you mean 'fields'"),
    ):
        with pytest.raises(UserError, match=message):
            call(eval_command, "eval", *line)
    with pytest.raises(UserError, match="no run folder"):
        call(report_command, "report", "runs/nothing")


@pytest.mark.slow
def test_two_processes_share_the_samples(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert call(eval_command, "eval", str(recipe), "--processes", "2", "--task", "fields", "--out", "two") == 0
    assert call(eval_command, "eval", str(recipe), "--out", "one") == 0
    assert Path("two/fields.jsonl").read_bytes() == Path("one/fields.jsonl").read_bytes()
    assert len(Path("two/fields.jsonl").read_text().splitlines()) == 5

"""`alignvlm report` and `alignvlm eval` as a person calls them, with a tiny real export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from alignvlm.metrics import registry
from data_pipeline.files import read_json_lines, write_json_lines
from data_pipeline.shards.writer import write_shards
from tests.checkout import ROOT
from tests.evaluation.benchmarks.files import png, tsv
from tests.fixtures.command import Command
from tests.tiny import picture, tiny_model

OWN_METRIC = (ROOT / "docs" / "evaluation.md").read_text().split("```python\n")[1].split("```")[0]
"""The metric `contains` of the documentation."""
UNTIMED = {"seconds": None, "replies_per_second": None}
"""What no two runs have in common."""


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


def test_eval_of_a_recipe_and_its_report(recipe: Path, command: Command) -> None:
    printed = command("eval", recipe)
    for word in ("fields", "Exact match", "ANLS", "Relaxed accuracy"):
        assert word in printed
    folder = recipe.parent / "runs" / "tiny" / "1-connector" / "evaluation"
    assert json.loads((folder / "results.json").read_text())["tasks"]["fields"]["items"] == 5
    views = list((folder / "gallery").glob("*.vocabulary.json"))
    assert len(views) == 2
    page = Path(command("report", "runs/tiny").split()[-1])
    assert page.read_text().count('class="overlay"') == 2


def test_a_metric_from_outside_reaches_results_table_and_report(
    recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    Path("own_metric.py").write_text(OWN_METRIC)
    config = yaml.safe_load(recipe.read_text()) | {"imports": ["own_metric.py"]}
    config["evaluation"]["tasks"]["fields"]["metrics"] = ["contains", "anls"]
    recipe.write_text(yaml.safe_dump(config, sort_keys=False))
    try:
        printed = command("eval", recipe)
    finally:
        sys.modules.pop("own_metric", None)
    folder = recipe.parent / "runs" / "tiny" / "1-connector" / "evaluation"
    entry = json.loads((folder / "results.json").read_text())["tasks"]["fields"]
    rows = read_json_lines(folder / "fields.jsonl")
    assert entry["contains"] == sum(row["contains"] for row in rows) / len(rows)
    assert entry["baseline"] == 1.0
    assert "exact_match" not in entry
    assert "Contains" in printed
    assert f"{entry['contains']:.3f}" in printed
    registry._METRICS.pop("contains")  # the report of a run needs none of the modules that the run imported
    page = Path(command("report", "runs/tiny").split()[-1])
    assert '<th class="wide">Contains</th>' in page.read_text()
    assert "an accepted answer occurs in the prediction" in page.read_text()
    reported = json.loads(page.with_name("results.json").read_text())["stages"]["connector"]["fields"]
    assert list(reported) == ["contains", "anls", "items", "baseline", "baseline_answer"]


def test_eval_of_an_export_folder_uses_its_runs_recipe(recipe: Path, command: Command) -> None:
    command("eval", "runs/tiny/1-connector/export", "--limit", "2")
    results = json.loads(Path("runs/tiny/1-connector/evaluation-2/results.json").read_text())
    assert results["tasks"]["fields"]["items"] == 2


def test_mistakes_say_the_way_out(recipe: Path, command: Command) -> None:
    export = "runs/tiny/1-connector/export"
    for line, message in (
        ((str(recipe), "--stage", "init"), "no export yet"),
        ((str(recipe), "--stage", "conector"), "known: init, connector"),
        ((str(recipe), "runs=elsewhere"), "train it first"),
        (("runs/tiny",), "not an export folder"),
        ((export, "--limit", "0"), "at least 1"),
        ((export, "--task", "field"), "did you mean 'fields'"),
    ):
        assert message in command("eval", *line, code=2)
    assert "there is no run folder" in command("report", "runs/nothing", code=2)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_bit_for_bit(
    recipe: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, _ = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained("runs/tiny/1-connector/export")
    rows = [{"index": n, "image": png(n, 24 + n), "question": f"q{n}", "answer": "a"} for n in range(19)]
    tsv(Path("DocVQA_VAL.tsv"), rows)
    write_json_lines(Path("pages.jsonl"), [{"text": f"page {n} " * n} for n in range(1, 6)])
    more = ("evaluation.text={pages: {path: pages.jsonl, window: 8}}",)
    more += ("evaluation.benchmarks={docvqa: {path: DocVQA_VAL.tsv, flavour: lmms_eval}}",)
    command("eval", recipe, *more, "--processes", "2", "--output", "two")
    command("eval", recipe, *more, "--output", "one")
    for name, lines in (("fields.jsonl", 5), ("text.json", None), ("benchmarks/docvqa.jsonl", 19)):
        content = Path("one", name).read_bytes()
        assert Path("two", name).read_bytes() == content
        assert lines in (None, len(content.splitlines()))
    one, two = (json.loads(Path(out, "benchmarks/results.json").read_text())["benchmarks"] for out in ("one", "two"))
    assert [{**entry["docvqa"], **UNTIMED} for entry in (one, two)] == [{**one["docvqa"], **UNTIMED}] * 2
    assert len({row["reply"] for row in read_json_lines(Path("one/benchmarks/docvqa.jsonl"))}) > 9

"""The paper's table, and benchmarks of a recipe: between stages, in the report, in MLflow."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.benchmarks.suite import BASES, COLUMNS, CONNECTORS, paper_average, paper_table
from alignvlm.report.report import build_report
from alignvlm.run_folder import Run
from alignvlm.training.run import evaluate_stage
from tests.evaluation.benchmarks.files import Known, docdownstream, document, parquet, png, struct, tsv
from tests.fixtures.command import Command
from tests.tiny import tiny_model
from tests.training.fakes import FakeWorld

QUESTION = "what is the total"


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny export in the working directory; its answers are `a`, for it would not end a reply by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelAnswerer, "load", lambda folder, device: Known(defaultdict(lambda: "a")))
    model, processor = tiny_model()
    model.save_pretrained("runs/tiny/1-connector/export")
    processor.save_pretrained("runs/tiny/1-connector/export")
    return Path("runs/tiny/1-connector/export")


def entry(score: float, **fields: object) -> dict[str, object]:
    made = {"score": score, "headline": "score", "items": 9, "interval": [1.0, 2.0], "flavour": "f", "notes": []}
    return made | {"limit": None} | fields


@pytest.mark.parametrize("published", [*CONNECTORS.values(), *BASES.values()])
def test_the_average_of_the_paper_is_the_plain_mean_of_nine(published: tuple[float, ...]) -> None:
    entries = {name: entry(score) for name, score in zip(COLUMNS, published, strict=False)}
    average = paper_average(entries)
    assert average == pytest.approx(published[-1], abs=0.0101)
    row = next(line for line in paper_table("mine", entries).splitlines() if line.startswith("| **mine**"))
    assert row.endswith(f"| {published[-2]:.2f} | {average:.2f} |")


def test_there_is_no_average_of_less_than_nine_whole_benchmarks() -> None:
    entries = {name: entry(50.0) for name in COLUMNS}
    assert paper_average(entries) == 50.0
    assert paper_average(entries | {"wtq": entry(50.0, limit=5)}) is None
    del entries["klc"]
    assert paper_average(entries) is None
    row = next(line for line in paper_table("mine", entries).splitlines() if line.startswith("| **mine**"))
    assert row == "| **mine** | 50.00 | 50.00 | 50.00 | – | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | – |"


def nine(root: Path) -> Path:
    """A folder with the data of all nine, one question each."""
    row = {"index": 0, "image": png(0, 32), "question": QUESTION, "answer": "a"}
    tsv(root / "docvqa" / "DocVQA_VAL.tsv", [row])
    tsv(root / "infovqa" / "InfoVQA_VAL.tsv", [row])
    tsv(root / "chartqa" / "ChartQA_TEST.tsv", [row])
    tsv(root / "textvqa" / "TextVQA_VAL.tsv", [row | {"answer": str(["a"] * 10)}])
    parquet(
        root / "tablevqabench" / "vwtq-0-of-1.parquet", [{"qa_id": "1", "image": struct(), "question": "q", "gt": "a"}]
    )
    for name, dataset, key in (
        ("deepform", "DeepForm", "advertiser"),
        ("klc", "KleisterCharity", "charity_name"),
        ("wtq", "WikiTableQuestions", QUESTION),
        ("tabfact", "TabFact", QUESTION),
    ):
        docdownstream(root / name, dataset, [("d", key, "True")], [document("d", **{key: "1"})])
    return root


def test_the_suite_prints_the_row_beside_the_published_ones(export: Path, command: Command) -> None:
    call = ("eval", export, "--suite", "paper", "--device", "cpu", "--data")
    printed = command(*call, nine(Path("data")))
    table = Path("runs/tiny/1-connector/benchmarks/paper.md").read_text()
    assert table in printed
    assert "| ALIGN (published) | 79.63 |" in table
    row = next(line for line in table.splitlines() if line.startswith(f"| **{export}**"))
    results = json.loads(Path("runs/tiny/1-connector/benchmarks/results.json").read_text())
    scores = [results["benchmarks"][name]["score"] for name in COLUMNS]
    assert scores == [100.0, 100.0, 0.0, 0.0, 0.0, 0.0, 100.0, 100.0, 100.0]
    assert results["paper_average"] == pytest.approx(sum(scores) / 9)
    assert row.split(" | ")[1:] == [*(f"{score:.2f}" for score in scores), f"{sum(scores) / 9:.2f} |"]
    printed = command(*call, "docvqa=data/docvqa", "--output", "one")
    assert "chartqa is left out: no folder of this name; give --data chartqa=PATH" in printed
    assert set(json.loads(Path("one/results.json").read_text())["benchmarks"]) == {"docvqa"}
    assert "found no data" in command(*call, "runs", code=2)
    assert "--data mmmu=x: mmmu is none of the benchmarks that are asked: docvqa, infovqa" in command(
        *call, "data", "--data", "mmmu=x", code=2
    )
    assert "leave --benchmark" in command(*call, "data", "--benchmark", "docvqa", code=2)


@pytest.fixture
def recipe(export: Path) -> Path:
    """A recipe whose evaluation is a benchmark, with the export of its stage."""
    row = {"image": png(0, 32), "question": QUESTION, "answer": "a"}
    tsv(Path("data/DocVQA_VAL.tsv"), [row | {"index": n} for n in range(3)])
    config = {
        "name": "tiny",
        "model": {
            "vision": {"config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}},
            "language": {"config": {"model_type": "llama"}, "tokenizer": {"vocab_size": 320}},
        },
        "data": {"sources": {"read": {"path": "read"}}},
        "stages": {"connector": {"mixture": {"read": 1}, "lr": {"default": 1e-3}, "deepspeed": "cpu_zero3"}},
        "evaluation": {"benchmarks": {"docvqa": {"path": "data/DocVQA_VAL.tsv", "limit": 2}}, "batch_size": 2},
        "train": {"precision": "fp32", "deepspeed": "cpu_zero3"},
    }
    for file in ("tiny.yaml", "runs/tiny/config.yaml"):
        Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return Path("tiny.yaml")


def test_a_recipes_benchmarks_run_between_stages_and_are_reported(recipe: Path, command: Command) -> None:
    run = Run(load_recipe(str(recipe)))
    folder = run.stage_folder(run.recipe.stages["connector"])
    world: Any = FakeWorld()
    evaluate_stage(run, folder, world)
    results = json.loads(folder.benchmarks.results.read_text())
    assert results["benchmarks"]["docvqa"]["items"] == 2
    page = build_report("runs/tiny")
    score = f"{results['benchmarks']['docvqa']['score']:.2f}"
    assert (
        f'<tr><th scope="row">DocVQA</th><td class="n">{score}</td><td>score, vlmevalkit, 2 questions'
        in page.read_text()
    )
    assert "ALIGN (published)" in page.read_text()
    assert json.loads(page.with_name("results.json").read_text())["benchmarks"]["connector"]["docvqa"]
    assert "DocVQA" in command("eval", recipe, "--device", "cpu")


def test_a_benchmark_that_cannot_be_used_is_an_error_with_its_line(recipe: Path, command: Command) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("docvqa:", "docvaq:"))
    message = command("config", "check", recipe, code=2)
    assert "tiny.yaml:" in message
    assert "evaluation.benchmarks.docvaq: unknown benchmark 'docvaq': did you mean 'docvqa'" in message
    recipe.write_text(text.replace("data/DocVQA_VAL.tsv", "data/none.tsv"))
    with pytest.raises(UserError, match=r"evaluation.benchmarks.docvqa: data/none.tsv: no such file or folder"):
        evaluate_stage(Run(load_recipe(str(recipe))), SimpleNamespace(export=None), FakeWorld())

"""lmms-eval itself runs a tiny export on local tasks: its replies and scores are those of `alignvlm eval`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from data_pipeline.files import read_json_lines
from tests.checkout import ROOT
from tests.evaluation.benchmarks.files import parquet, png
from tests.tiny import WORDS, tiny_model

pytestmark = pytest.mark.harness
LMMS_EVAL = Path(sys.executable).with_name("lmms-eval")
MMLU = """
task: mmlu_local
dataset_path: data/mmlu
test_split: test
output_type: multiple_choice
doc_to_text: !function own.text
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
OWN = """
def text(doc):
    options = "".join(f"{letter}. {choice}\\n" for letter, choice in zip("ABCD", doc["choices"]))
    head = f"The following are multiple choice questions (with answers) about {doc['subject']}."
    return f"{head}\\n\\n{doc['question']}\\n{options}Answer:"
"""


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export that says various things, in the working directory, with the task of the documentation beside it."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})
    model.save_pretrained("export")
    processor.save_pretrained("export")
    Path("tasks").mkdir()
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"^```yaml\n(task: docvqa_local\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("tasks/docvqa_local.yaml").write_text(task)
    return Path("export")


def docvqa(replies: list[str]) -> Path:
    """Eleven questions of several lengths and picture sizes; to half of them the replies are right."""
    import datasets

    count = len(replies)
    rows = {
        "questionId": [str(n) for n in range(count)],
        "question": [f"{WORDS[n % 5]} {'of the page ' * (n % 3)}?" for n in range(count)],
        "image": [{"bytes": png(n, 20 + 16 * (n % 4)), "path": None} for n in range(count)],
        "answers": [[reply if n % 2 else f"{reply[:1]}zzz"] for n, reply in enumerate(replies)],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    folder = Path("data/DocVQA/DocVQA")
    folder.mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder.parent


def ours(name: str, data: Path, out: str) -> tuple[dict[str, Any], list[str]]:
    """The entry of results.json, and the replies."""
    results = run_benchmarks("export", [Job.of(name, data, "lmms_eval")], out, batch_size=2, device="cpu")
    return results["benchmarks"][name], [row["reply"] for row in read_json_lines(Path(out, f"{name}.jsonl"))]


def lmms_eval(task: str, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The task's results, and its samples in order."""
    command = [
        LMMS_EVAL, "--model", "alignvlm", "--model_args", "pretrained=export", "--include_path", "tasks", "--tasks",
        task, "--batch_size", "2", "--device", "cpu", "--log_samples", "--output_path", "results", *words,
    ]  # fmt: skip
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("hub").absolute()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=300, check=False)
    (results,) = list(Path("results").rglob("*_results.json")) or pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
    (samples,) = Path("results").rglob(f"*samples_{task}.jsonl")
    found = json.loads(results.read_text())["results"][task]
    return found, sorted(read_json_lines(samples), key=lambda row: row["doc_id"])


def test_replies_and_scores_are_those_of_alignvlm_eval(export: Path) -> None:
    _, said = ours("docvqa", docvqa([""] * 11), "first")
    assert len(set(said)) > 4
    entry, replies = ours("docvqa", docvqa(said), "benchmarks")
    assert replies == said
    found, samples = lmms_eval("docvqa_local")
    assert [row["filtered_resps"] for row in samples] == [reply.strip() for reply in replies]
    assert found["anls,none"] == pytest.approx(entry["score"] / 100, abs=1e-9)
    assert 0.4 < found["anls,none"] < 0.9


def test_likelihoods_choose_what_alignvlm_eval_chooses(export: Path) -> None:
    Path("tasks/mmlu_local.yaml").write_text(MMLU)
    Path("tasks/own.py").write_text(OWN)
    rows = [
        {"question": WORDS[n % 5], "subject": "law", "choices": [f"{WORDS[m]} {n}" for m in range(4)], "answer": n % 4}
        for n in range(9)
    ]
    parquet(Path("data/mmlu/test-00000-of-00001.parquet"), rows)
    entry, replies = ours("mmlu", Path("data/mmlu"), "benchmarks")
    found, samples = lmms_eval("mmlu_local", "--force_simple")
    right = ["ABCD"[row["answer"]] == reply for row, reply in zip(rows, replies, strict=True)]
    assert [row["acc"] == 1 for row in samples] == right
    assert found["acc,none"] == pytest.approx(entry["score"] / 100)
    assert len(set(replies)) > 1


def test_a_setting_that_is_not_there_is_named(export: Path) -> None:
    from alignvlm.errors import UserError
    from alignvlm.evaluation.harness.lmms_eval import AlignVLM

    with pytest.raises(UserError, match="no setting 'dtype'"):
        AlignVLM.create_from_arg_string("pretrained=export,dtype=bfloat16", {"batch_size": "1", "device": "cpu"})
    with pytest.raises(UserError, match="--batch_size auto"):
        AlignVLM.create_from_arg_string("pretrained=export", {"batch_size": "auto", "device": "cpu"})

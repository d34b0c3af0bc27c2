"""`alignvlm eval` of a published benchmark by two real processes, killed on the way: the bytes of one that was not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_pipeline.files import read_json_lines
from tests.evaluation.benchmarks.files import png, tsv
from tests.fixtures.command import Command
from tests.jobs import kill, start
from tests.tiny import WORDS, tiny_model

QUESTIONS = 48


def test_two_processes_and_one_that_goes_on_give_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5}):  # says various things
        part.save_pretrained("export")
    rows = [
        {"index": n, "image": png(n, 16 + n % 4), "question": f"{WORDS[n % 5]} {n}", "answer": "12.50"}
        for n in range(QUESTIONS)
    ]
    tsv(Path("DocVQA_VAL.tsv"), rows)
    words = ("--benchmark", "docvqa", "--data", "DocVQA_VAL.tsv", "--flavour", "lmms_eval", "--batch-size", "2")
    call = ("eval", "export", *words, "--device", "cpu", "--output")
    command(*call, "alone")

    job = start(*call, "both", "--processes", "2", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while len(begun := [part for part in Path("both").glob("parts/*/*.jsonl") if part.stat().st_size]) < 2:
            assert job.poll() is None, job.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        kill(job)
    answered = [row["index"] for part in begun for row in read_json_lines(part)]
    assert 2 <= len(answered) < QUESTIONS
    command(*call, "both")
    replies = Path("alone/docvqa.jsonl").read_bytes()
    assert Path("both/docvqa.jsonl").read_bytes() == replies
    assert len({row["reply"] for row in read_json_lines(Path("alone/docvqa.jsonl"))}) > 10

"""The general benchmarks, VCR and MMLU from tiny files in their layouts, with the values that the evaluators give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from alignvlm.evaluation.likelihood import log_likelihoods
from tests.evaluation.benchmarks.files import Known, lines, parquet, png, struct, tsv
from tests.fixtures.command import Command
from tests.tiny import tiny_model


def run(out: Path, name: str, data: Path, replies: dict[str, str], flavour: str | None = None) -> tuple[dict, Known]:
    """The benchmark's entry of results.json, and what the model was asked."""
    answerer = Known(replies)
    results = run_benchmarks("model", [Job.of(name, data, flavour)], out, answerer=answerer)
    return results["benchmarks"][name], answerer


def message(asked: tuple[Any, ...]) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in asked[0])


def test_pope_in_every_layout(tmp_path: Path) -> None:
    """The first case of `pope_official` among the evaluator's own."""
    rows = [("q0", "yes", "Yes"), ("q1", "no", "No"), ("q2", "no", "yes"), ("q3", "yes", "no")]
    replies = {question: reply for question, _, reply in rows}
    hub = [{"question": q, "answer": a, "category": "random", "image": struct()} for q, a, _ in rows]
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", hub)
    parquet(tmp_path / "hub" / "Full" / "random-00000-of-00001.parquet", hub)
    parquet(tmp_path / "full" / "Full" / "random-00000-of-00001.parquet", hub)
    kit = [
        {"index": n, "question": q, "answer": a.capitalize(), "category": "random", "image": png()}
        for n, (q, a, _) in enumerate(rows)
    ]
    tsv(tmp_path / "kit" / "POPE.tsv", kit)
    own = [{"question_id": n, "image": "a.jpg", "text": q, "label": a} for n, (q, a, _) in enumerate(rows)]
    lines(tmp_path / "own" / "coco_pope_random.json", own)
    (tmp_path / "own" / "val2014").mkdir()
    (tmp_path / "own" / "val2014" / "a.jpg").write_bytes(png())
    for place in ("hub", "full", "kit", "own"):
        for flavour in ("vlmevalkit", "lmms_eval", "official"):
            entry, _ = run(tmp_path / place / flavour, "pope", tmp_path / place, replies, flavour)
            assert (entry["score"], entry["headline"], entry["items"]) == (50.0, "f1", 4)
            assert {entry["scores"][name] for name in ("accuracy", "precision", "recall", "yes_ratio")} == {50.0}
            assert entry["scores"]["f1.random"] == 50.0


def test_pope_of_vlmevalkit_repeats_rows_of_several_categories(tmp_path: Path) -> None:
    """The first case of `pope_rating_vlmevalkit` among the evaluator's own."""
    categories = ("adversarial,popular", "random", "popular", "random")
    answers, replies = ("Yes", "No", "No", "Yes"), ("Yes", "No", "Yes", "maybe")
    rows = [
        {"index": n, "question": f"q{n}", "answer": a, "category": c, "image": png()}
        for n, (a, c) in enumerate(zip(answers, categories, strict=True))
    ]
    tsv(tmp_path / "POPE.tsv", rows)
    entry, _ = run(tmp_path / "out", "pope", tmp_path, {f"q{n}": reply for n, reply in enumerate(replies)})
    assert entry["score"] == pytest.approx(200 / 3)
    assert entry["scores"]["accuracy"] == pytest.approx(60.0)
    assert entry["scores"]["f1.adversarial"] == 100.0
    assert entry["scores"]["accuracy.popular"] == 50.0
    assert entry["scores"]["neither"] == 25.0


def test_gqa_joins_questions_and_pictures(tmp_path: Path) -> None:
    for suffix, rows in (
        ("instructions", [{"id": f"{n}", "imageId": "n1", "question": f"q{n}", "answer": "t-shirt"} for n in range(2)]),
        ("images", [{"id": "n1", "image": struct(4)}]),
    ):
        parquet(tmp_path / f"testdev_balanced_{suffix}" / "testdev-00000-of-00001.parquet", rows)
    replies = {"q0": "T-shirt.", "q1": "t-shirt"}
    entry, answerer = run(tmp_path / "v", "gqa", tmp_path, replies)
    assert entry["score"] == 50.0
    assert run(tmp_path / "l", "gqa", tmp_path, replies, "lmms_eval")[0]["score"] == 100.0
    assert answerer.asked["0"][1][0].size == (8, 8)
    gone = [{"id": "0", "imageId": "n2", "question": "q0", "answer": "x"}]
    parquet(tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", gone)
    with pytest.raises(UserError, match="column 'imageId' names no image of config 'testdev_balanced_images': 'n2'"):
        run(tmp_path / "g", "gqa", tmp_path, replies)


def test_seedbench_reads_images_only(tmp_path: Path) -> None:
    row = {f"choice_{letter}": f"{letter}{letter}" for letter in "abcd"} | {"answer": "B"}
    kinds = ("image", "video", "image")
    rows = [row | {"question_id": f"{n}", "question": f"q{n}", "data_type": kind} for n, kind in enumerate(kinds)]
    images = ([struct()], [struct(), struct()], [struct()])
    parquet(tmp_path / "hub" / "test-0-of-1.parquet", [r | {"image": i} for r, i in zip(rows, images, strict=True)])
    (tmp_path / "own" / "SEED-Bench-image").mkdir(parents=True)
    (tmp_path / "own" / "SEED-Bench-image" / "a").write_bytes(png())
    (tmp_path / "own" / "SEED-Bench.json").write_text(json.dumps({"questions": [r | {"data_id": "a"} for r in rows]}))
    kit = {letter: row[f"choice_{letter.lower()}"] for letter in "ABCD"} | {"answer": "B", "image": png()}
    tsv(tmp_path / "kit" / "SEEDBench_IMG.tsv", [kit | {"index": n, "question": f"q{n}"} for n in (0, 2)])
    for place in ("hub", "own", "kit"):
        entry, answerer = run(tmp_path / place / "v", "seedbench", tmp_path / place, {"q0": "(B).", "q2": "Bananas"})
        assert (entry["score"], entry["scores"]["unparsed"], entry["items"]) == (50.0, 50.0, 2)
        text = "<image>Question: q0\nOptions:\nA. aa\nB. bb\nC. cc\nD. dd\n"
        assert message(answerer.asked["0"]) == text + "Please select the correct answer from the options above. \n"
        entry, _ = run(
            tmp_path / place / "l", "seedbench", tmp_path / place, {"q0": "(B).", "q2": "Bananas"}, "lmms_eval"
        )
        assert entry["score"] == 50.0
        few = Job.of("seedbench", tmp_path / place, limit=2)  # questions, not rows of the file
        results = run_benchmarks("model", [few], tmp_path / place / "few", answerer=Known({"q0": "B", "q2": "A"}))
        assert results["benchmarks"]["seedbench"]["items"] == 2


def test_mmmu_places_images_and_counts_what_cannot_be_parsed(tmp_path: Path) -> None:
    choice = {"question_type": "multiple-choice", "options": "['<image 3>', 'so <image 1>']", "answer": "B"}
    rows = [
        {"id": "validation_Math_1", "question": "see <image 1> now", **choice},
        {
            "id": "validation_Math_2",
            "question": "free <image 1>",
            "question_type": "open",
            "options": "[]",
            "answer": "['24/7', '3.429']",
        },
        {"id": "validation_Art_1", "question": "none <image 1>", **choice, "options": "['x', 'y']"},
    ]
    pictures = {f"image_{n}": struct(n) if n < 4 else None for n in range(1, 8)}
    for row in rows:
        parquet(tmp_path / row["id"].split("_")[1] / "validation-00000-of-00001.parquet", [row | pictures])
    parquet(tmp_path / "Math" / "validation-00000-of-00001.parquet", [row | pictures for row in rows[:2]])
    parquet(tmp_path / "Math" / "dev-00000-of-00001.parquet", [rows[0] | pictures])
    replies = {rows[0]["question"]: "B", rows[1]["question"]: "x = 3.429", rows[2]["question"]: "?"}
    entry, answerer = run(tmp_path / "l", "mmmu", tmp_path, replies, "lmms_eval")
    assert entry["score"] == pytest.approx(200 / 3)
    assert entry["scores"]["unparsed"] == pytest.approx(100 / 3)
    assert (entry["scores"]["Science"], entry["scores"]["Art and Design"]) == (100.0, 0.0)
    parts, images, _ = answerer.asked["validation_Math_1"]
    assert [image.tobytes() for image in images] == [run_image(1), run_image(3)]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]
    entry, answerer = run(tmp_path / "v", "mmmu", tmp_path, replies)
    assert entry["score"] == pytest.approx(100 / 3)  # an open question with several answers is never right there
    _, images, _ = answerer.asked["validation_Math_1"]
    assert [image.tobytes() for image in images] == [run_image(1), run_image(3), run_image(1)]


def run_image(seed: int) -> bytes:
    from data_pipeline.samples.images import decode_image

    return decode_image(png(seed)).tobytes()


def test_mmmu_from_tsv_asks_the_validation_split(tmp_path: Path) -> None:
    row = {"question": "q <image 1>", "A": "x", "B": "None", "C": "", "answer": "B", "image": png(), "hint": ""}
    tsv(tmp_path / "MMMU_DEV_VAL.tsv", [row | {"index": n, "split": s} for n, s in enumerate(("dev", "validation"))])
    entry, answerer = run(tmp_path / "out", "mmmu", tmp_path, {"q <image 1>": "B"})
    assert (entry["score"], entry["items"]) == (100.0, 1)
    first = run_benchmarks("m", [Job.of("mmmu", tmp_path, limit=1)], tmp_path / "one", answerer=answerer)
    assert first["benchmarks"]["mmmu"]["score"] == 100.0  # the row of `dev` is none of the questions
    assert message(answerer.asked["1"]).startswith("Question: q <image>\nOptions:\nA. x\nB. None\nPlease")


def test_mmvet_is_scored_by_a_judge_only(tmp_path: Path, command: Command) -> None:
    """The first case of `mmvet_aggregate` among the evaluator's own."""
    needs = ("rec", "ocr,math", "rec,know,gen", "ocr,spat")
    rows = {
        f"v1_{n}": {"imagename": "a.png", "question": f"q{n}", "answer": "a", "capability": need.split(",")}
        for n, need in enumerate(needs)
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    replies = {f"q{n}": f" reply {n} " for n in range(4)}
    entry, _ = run(tmp_path / "out", "mmvet", tmp_path, replies)
    assert entry["score"] is None
    assert entry["notes"][0].startswith("not scored")
    submission = json.loads((tmp_path / "out" / "mmvet.submission.json").read_text())
    assert submission == {f"v1_{n}": f"reply {n}" for n in range(4)}
    assert "not scored" in command("score", tmp_path / "out" / "mmvet.jsonl")
    (tmp_path / "judge.json").write_text(json.dumps(dict(zip(submission, (1.0, 0.5, 0.0, 0.3), strict=True))))
    printed = command("score", tmp_path / "out" / "mmvet.jsonl", "--judge", tmp_path / "judge.json")
    assert "45.00" in printed
    assert "ocr 40.00" in printed
    runs = {"v1_0": [1.0, 0.8], "v1_1": [0.5, 0.5], "v1_2": [0.0, 0.0], "v1_3": [0.3, 0.1]}  # of the official judge
    judged = {id: {"model": ["gpt"] * 2, "content": ["x"] * 2, "score": scores} for id, scores in runs.items()}
    (tmp_path / "judge.json").write_text(json.dumps(judged))
    assert "40.00" in command("score", tmp_path / "out" / "mmvet.jsonl", "--judge", tmp_path / "judge.json")
    (tmp_path / "judge.json").write_text('{"v1_0": {"grade": 1}}')
    message = command("score", tmp_path / "out" / "mmvet.jsonl", "--judge", tmp_path / "judge.json", code=2)
    assert "must be a JSON object" in message
    (tmp_path / "judge.json").write_text('{"v1_0": 1}')
    message = command("score", tmp_path / "out" / "mmvet.jsonl", "--judge", tmp_path / "judge.json", code=2)
    assert "no score from 0 to 1 for the reply 'v1_1'" in message


def test_vcr_is_a_mean_over_covered_texts(tmp_path: Path) -> None:
    hub = tmp_path / "VCR-wiki-en-easy-test-100"
    blanks = [["two three four", "five six seven"], ["a"]]
    rows = [
        {"question_id": n, "stacked_image": struct(n), "image": struct(), "caption": "c", "crossed_text": each}
        for n, each in enumerate(blanks)
    ]
    parquet(hub / "data" / "test-00000-of-00001.parquet", rows)
    ask = (
        "What is the covered texts in the image? Please restore the covered texts without outputting the explanations."
    )
    entry, answerer = run(tmp_path / "out", "vcr_en_easy", hub, {ask: "one two three four five six"}, "lmms_eval")
    assert entry["score"] == pytest.approx(100 / 3)
    assert entry["scores"]["jaccard"] == pytest.approx(50.0)
    assert answerer.asked["0"][2] == 120
    with pytest.raises(UserError, match="its name says 'easy': it is the dataset of another benchmark"):
        Job.of("vcr_en_hard", hub)
    row = {"index": 0, "image": png(), "question": "", "answer": "['a']"}
    tsv(tmp_path / "VCR_EN_HARD_100.tsv", [row])
    with pytest.raises(UserError, match="column 'question' is empty"):
        run(tmp_path / "h", "vcr_en_hard", tmp_path / "VCR_EN_HARD_100.tsv", {})


def test_mmlu_takes_examples_of_the_subject(tmp_path: Path) -> None:
    options = ["w", "x", "y", "z"]
    rows = [{"question": f" q{n} ", "subject": "us_law", "choices": options, "answer": 2} for n in range(2)]
    example = {"question": "e", "subject": "us_law", "choices": options, "answer": 1}
    parquet(tmp_path / "all" / "test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "us_law" / "test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "all" / "dev-00000-of-00001.parquet", [example, example | {"subject": "art"}])
    entry, answerer = run(tmp_path / "out", "mmlu", tmp_path, {"q0": "C", "q1": "D"})
    assert (entry["score"], entry["items"], entry["scores"]["1 examples"]) == (50.0, 2, 50.0)
    assert [len(batch) for batch in answerer.batches] == [2]
    listed = "A. w\nB. x\nC. y\nD. z\nAnswer:"
    head = "The following are multiple choice questions (with answers) about us law.\n\n"
    assert answerer.asked["q0"] == f"{head}e\n{listed} B\n\nq0\n{listed}"


def test_likelihoods_are_those_of_the_whole_text() -> None:
    """Against one pass per prompt and continuation, without sharing, padding or leaving out positions."""
    model, processor = tiny_model()
    model.eval()
    asked = [
        ("what is the total", [" 12.50", " name", " the answer is", " x"]),
        ("read the field user assistant system what is the total", [" A", " B"]),
        ("name", [" date amount"]),
    ]
    got = log_likelihoods(model, processor.tokenizer, "cpu", asked)
    assert [len(each) for each in got] == [4, 2, 1]
    for (prompt, continuations), found in zip(asked, got, strict=True):
        start = len(processor.tokenizer(prompt)["input_ids"])
        for text, value in zip(continuations, found, strict=True):
            ids = torch.tensor([processor.tokenizer(prompt + text)["input_ids"]])
            with torch.inference_mode():
                logs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
            said = [logs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]
            assert math.isclose(value.log, sum(map(float, said)), abs_tol=1e-5)
            assert value.tokens == len(said)
            assert value.is_greedy == all(each == logs[start - 1 + i].max() for i, each in enumerate(said))

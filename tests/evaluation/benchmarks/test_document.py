"""The document benchmarks from tiny files in every layout: known replies give the value that the evaluators give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from tests.evaluation.benchmarks.files import Known, docdownstream, document, lines, parquet, png, struct, tsv


def scores(
    tmp_path: Path, name: str, data: Path, replies: dict[str, str], flavour: str | None = None
) -> dict[str, Any]:
    """The benchmark's entry of results.json."""
    job = Job.of(name, data, flavour)
    return run_benchmarks("model", [job], tmp_path / "out", answerer=Known(replies))["benchmarks"][name]


@pytest.mark.parametrize("place", ["DocVQA/validation-00000-of-00001.parquet", "data/DocVQA/validation-0-of-1.parquet"])
def test_docvqa_from_parquet(tmp_path: Path, place: str) -> None:
    rows = [
        {"questionId": str(n), "question": f"q{n}", "image": struct(n), "answers": ["ABCD", "x"], "docId": n}
        for n in range(3)
    ]
    parquet(tmp_path / "data" / place, rows)
    parquet(tmp_path / "data" / "InfographicVQA" / "validation-00000-of-00001.parquet", rows[:1])
    parquet(tmp_path / "data" / "DocVQA" / "test-00000-of-00001.parquet", rows[:1])
    entry = scores(tmp_path, "docvqa", tmp_path / "data", {"q0": "abcd ", "q1": "abxy", "q2": "zz"})
    assert (entry["score"], entry["items"], entry["layout"]) == (50.0, 3, "huggingface")
    assert entry["prompt"] == "<image>q0\nAnswer the question using a single word or phrase."
    assert entry["notes"] == ["3 questions, the published set has 5,349"]


def test_a_dataset_card_names_the_files(tmp_path: Path) -> None:
    row = {"questionId": "1", "question": "q", "image": struct(), "answers": ["a"]}
    parquet(tmp_path / "info" / "val-a.parquet", [row])
    parquet(tmp_path / "info" / "validation-0.parquet", [row, row])
    files = "  data_files:\n  - split: validation\n    path: info/val-*\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: InfographicVQA\n{files}---\n# x\n")
    assert Job.of("infovqa", tmp_path).reader.size == 1


def test_docvqa_from_tsv_with_shared_images_and_words_that_pandas_drops(tmp_path: Path) -> None:
    rows = [
        {"index": 7, "image": 9, "question": 'what is "it"\nhere', "answer": "['None', 'n/a']"},
        {"index": 8, "image": [png(1), png(2)], "question": "two", "answer": "NA"},
        {"index": 9, "image": png(3), "question": "three", "answer": "[broken"},
    ]
    file = tsv(tmp_path / "DocVQA_VAL.tsv", rows)
    answerer = Known({'what is "it"\nhere': "none", "two": "NA", "three": "[broken"})
    result = run_benchmarks("model", [Job.of("docvqa", tmp_path)], tmp_path / "out", answerer=answerer)
    assert result["benchmarks"]["docvqa"]["score"] == 100.0
    assert [len(answerer.asked[key][1]) for key in "789"] == [1, 2, 1]
    assert answerer.asked["7"][1][0].tobytes() == answerer.asked["9"][1][0].tobytes()
    assert file.read_text().count("\n") == 5  # the question with a newline is one row


def test_local_tsv_reads_images_from_files(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "DocVQA_VAL"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    rows = [
        {"index": 0, "image_path": name, "question": name, "answer": "x"} for name in ("a.png", "['a.png', 'a.png']")
    ]
    tsv(tmp_path / "DocVQA_VAL_local.tsv", rows)
    assert scores(tmp_path, "docvqa", tmp_path, {"a.png": "x", "['a.png', 'a.png']": "y"})["score"] == 50.0
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"DocVQA_VAL_local.tsv, row 0: the image of column 'image_path' is not there"):
        scores(tmp_path / "again", "docvqa", tmp_path, {})


def test_names_in_a_benchmark_file_stay_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    (folder / "images" / "DocVQA_VAL").mkdir(parents=True)
    for name in ("../../../secret.png", str(tmp_path / "secret.png")):
        tsv(folder / "DocVQA_VAL_local.tsv", [{"index": 0, "image_path": name, "question": "q", "answer": "x"}])
        with pytest.raises(UserError, match=r"row 0: column 'image_path' must be a path below .*DocVQA_VAL, not "):
            scores(tmp_path, "docvqa", folder, {"q": "x"})
        line = {"image": [name], "messages": [{"role": r, "content": "q"} for r in ("user", "assistant")]}
        file = lines(folder / "test" / "DocVQA_test.jsonl", [line])
        with pytest.raises(UserError, match=r"line 1: column 'image' must be a path below "):
            scores(tmp_path, "docvqa", file, {"q": "x"})


def test_docvqa_from_docdownstream_takes_the_variants(tmp_path: Path) -> None:
    papers = [document("d", **{"Who?": "A B"}), document("e", **{"Who?": "C"})]
    papers[0]["annotations"][0]["values"][0]["value_variants"] = ["A B", "ABC"]
    docdownstream(tmp_path, "DocVQA", [("d", "Who?", "A B"), ("e", "Who?", "C")], papers)
    entry = scores(tmp_path, "docvqa", tmp_path, {"Who?": "abc"}, "docowl")
    assert entry["score"] == pytest.approx(50.0)
    assert entry["prompt"] == "<image>Who?"


FORMS = [
    ("a", f"What is the value for the {key}?", answer)
    for key, answer in (("advertiser", "Joe"), ("flight_from", "None"), ("gross_amount", "10"), ("contract_num", "123"))
]


def test_deepform_counts_pairs_over_documents_and_keys(tmp_path: Path) -> None:
    """The second case of `due_f1_deepform` among the evaluator's own, as a file."""
    papers = [document("a", advertiser="Joe", gross_amount="10", contract_num="123")]
    docdownstream(tmp_path, "DeepForm", FORMS, papers)
    replies = dict(zip([question for _, question, _ in FORMS], ["joe", "None", "9\n", " None"], strict=True))
    entry = scores(tmp_path, "deepform", tmp_path, replies)
    assert entry["score"] == pytest.approx(40.0)
    assert entry["scores"]["precision"] == pytest.approx(50.0)
    assert entry["scores"]["recall"] == pytest.approx(100 / 3)
    assert (entry["scores"]["f1.advertiser"], entry["scores"]["f1.gross_amount"]) == (100.0, 0.0)
    assert entry["units"] == 1
    assert entry["notes"] == ["4 questions, the published set is said to have 1,500"]


def test_forms_without_documents_are_called_an_approximation(tmp_path: Path) -> None:
    docdownstream(tmp_path, "DeepForm", FORMS, None)
    entry = scores(tmp_path, "deepform", tmp_path, {question: answer for _, question, answer in FORMS})
    assert entry["score"] == 100.0
    assert entry["notes"][0].startswith("approximation: without meta/document.jsonl")


def test_klc_has_its_own_keys(tmp_path: Path) -> None:
    rows = [("a", "the charity_name", "X"), ("a", "the report_date", "2016-03-31"), ("b", "the charity_name", "Y")]
    papers = [document("a", charity_name="x", report_date="2016-03-31"), document("b", charity_name=["Y", "Z"])]
    docdownstream(tmp_path, "KleisterCharity", rows, papers)
    entry = scores(tmp_path, "klc", tmp_path, {"the charity_name": "X", "the report_date": "2016-03-31"})
    precision, recall = 2 / 3, 2 / 4
    assert entry["score"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_documents_that_do_not_fit_the_questions_are_an_error(tmp_path: Path) -> None:
    papers = [document("b", advertiser="Joe"), document("a", advertiser="Joe")]
    docdownstream(tmp_path, "DeepForm", FORMS, papers)
    with pytest.raises(UserError, match=r"document 1 of metadata.jsonl is 'a', that of document.jsonl is 'b'"):
        Job.of("deepform", tmp_path)
    docdownstream(tmp_path, "DeepForm", [("a", "who asks?", "x")], [document("a", advertiser="Joe")])
    with pytest.raises(UserError, match=r"line 1: column 'question' names no field of DeepForm \(advertiser, "):
        scores(tmp_path, "deepform", tmp_path, {})
    for damaged in ({"name": "a"}, {"name": "a", "annotations": [{"key": "advertiser", "values": [{"value": 3}]}]}):
        lines(tmp_path / "meta" / "DeepForm" / "test" / "document.jsonl", [damaged])
        with pytest.raises(UserError, match=r"document.jsonl, line 1: not a document with a name and annotations"):
            Job.of("deepform", tmp_path)
    docdownstream(tmp_path, "DeepForm", [("a", "who asks?", "x")], [document("a", advertiser="Joe")])
    lines(tmp_path / "meta" / "DeepForm" / "test" / "metadata.jsonl", [])
    with pytest.raises(UserError, match="0 lines for 1 questions"):
        Job.of("deepform", tmp_path)


def test_wtq_compares_with_all_values_of_the_document(tmp_path: Path) -> None:
    rows = [("t1", "who", "Italy"), ("t1", "how many", "2.0"), ("t2", "who", "A")]
    papers = [document("t1", who="Italy", **{"how many": "2.0"}), document("t2", who=["A", "B"])]
    docdownstream(tmp_path, "WikiTableQuestions", rows, papers)
    entry = scores(tmp_path, "wtq", tmp_path, {"who": "Italy.", "how many": "2"})
    assert entry["score"] == pytest.approx(200 / 3)
    one = Job.of("wtq", tmp_path, limit=1)
    assert one.end == 2  # the questions about one table stay together
    result = run_benchmarks("model", [one], tmp_path / "two", answerer=Known({"who": "B | A", "how many": "B"}))
    assert result["benchmarks"]["wtq"]["items"] == 2


def test_wtq_from_the_authors_files_knows_canonical_forms(tmp_path: Path) -> None:
    head = "id\tutterance\tcontext\ttargetValue\ttokens\ttargetCanon\ttargetCanonType"
    row = "nu-0\thow many\tcsv/204-csv/1.csv\t100,000\tx\u2028\x85y\t100000.0\tnumber"
    (tmp_path / "pristine-unseen-tables.tagged").write_text(f"{head}\n{row}\n")
    (tmp_path / "images" / "204-csv").mkdir(parents=True)
    (tmp_path / "images" / "204-csv" / "1.png").write_bytes(png())
    entry = scores(tmp_path, "wtq", tmp_path, {"how many": "100000"})
    assert (entry["score"], entry["flavour"]) == (100.0, "official")
    for damaged, column in ((row.replace("100,000", "1|2"), "targetCanon"), ("nu-0\thow many", "context")):
        (tmp_path / "pristine-unseen-tables.tagged").write_text(f"{head}\n{damaged}\n")
        with pytest.raises(UserError, match=f"pristine-unseen-tables.tagged, item 0: column '{column}' "):
            scores(tmp_path, "wtq", tmp_path, {"how many": "1"})
    with pytest.raises(UserError, match="flavour 'docowl' needs layout docdownstream, ureader, this is original"):
        Job.of("wtq", tmp_path, "docowl")


def test_tabfact_is_compared_exactly_and_may_lack_a_table(tmp_path: Path) -> None:
    rows = [("t1", "one", "True"), ("t3", "two", "False."), ("t3", "three", "True")]
    papers = [document("t1", one="1"), document("t2", x="0"), document("t3", two="0", three="1")]
    docdownstream(tmp_path, "TabFact", rows, papers)
    entry = scores(tmp_path, "tabfact", tmp_path, {"one": "True", "two": "False", "three": "true"})
    assert entry["score"] == pytest.approx(200 / 3)
    assert entry["scores"]["tolerant"] == 100.0
    assert entry["notes"][0] == "no question is about 1 documents of document.jsonl, such as 't2'"
    statements = {"t.csv": [["s1", "s2"], [1, 0], "caption"]}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "test_examples.json").write_text(json.dumps(statements))
    (tmp_path / "own" / "t.png").write_bytes(png())
    with pytest.raises(UserError, match=r"test_examples.json, item 0: the image of column 'image' is not there"):
        scores(tmp_path, "tabfact", tmp_path / "own", {})
    (tmp_path / "own" / "images").mkdir()
    (tmp_path / "own" / "t.png").rename(tmp_path / "own" / "images" / "t.png")
    assert scores(tmp_path, "tabfact", tmp_path / "own", {"s1": "True", "s2": "True"})["score"] == 50.0


CHARTS = [("one", "14", "human"), ("two", "100", "augmented")]


def test_chartqa_from_every_layout(tmp_path: Path) -> None:
    kinds = {"human": "human_test", "augmented": "augmented_test"}
    parquet(
        tmp_path / "lmms" / "data" / "test-00000-of-00001.parquet",
        [{"type": kinds[part], "question": q, "answer": a, "image": struct()} for q, a, part in CHARTS],
    )
    parquet(
        tmp_path / "m4" / "data" / "test-00000-of-00001.parquet",
        [{"query": q, "label": [a], "human_or_machine": int(p != "human"), "image": struct()} for q, a, p in CHARTS],
    )
    tsv(
        tmp_path / "v" / "ChartQA_TEST.tsv",
        [{"index": q, "question": q, "answer": a, "split": p, "image": png()} for q, a, p in CHARTS],
    )
    docdownstream(tmp_path / "d", "ChartQA", [("x", q, f"{a}.") for q, a, _ in CHARTS], None)
    own = tmp_path / "ChartQA Dataset" / "test"
    (own / "png").mkdir(parents=True)
    (own / "png" / "a.png").write_bytes(png())
    for (question, label, _), name in zip(CHARTS, ("test_human.json", "test_augmented.json"), strict=True):
        (own / name).write_text(json.dumps([{"imgname": "a.png", "query": question, "label": label}]))
    for data, layout in (
        ("lmms", "huggingface"),
        ("m4", "huggingface"),
        ("v", "vlmevalkit"),
        ("d", "docdownstream"),
        ("ChartQA Dataset", "original"),
    ):
        flavour = "docowl" if layout == "docdownstream" else None
        entry = scores(tmp_path / data, "chartqa", tmp_path / data, {"one": "15", "two": "103"}, flavour)
        assert (entry["score"], entry["layout"]) == (50.0, layout)
        if layout != "docdownstream":
            assert (entry["scores"]["human"], entry["scores"]["augmented"]) == (0.0, 100.0)


def test_ureader_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": "<image>"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "7"}]
    lines(tmp_path / "test_ChartQA.jsonl", [{"image": ["a.png"], "conversations": turns}])
    assert scores(tmp_path, "chartqa", tmp_path, {"q": "7"}, "docowl")["score"] == 100.0


def test_textvqa_needs_ten_answers(tmp_path: Path) -> None:
    row = {"question_id": 3, "question": "What Brand", "image": struct(), "answers": ["nokia"] * 3 + ["x"] * 7}
    parquet(tmp_path / "validation-00000-of-00003.parquet", [row])
    assert scores(tmp_path, "textvqa", tmp_path, {"What Brand": "Nokia"})["score"] == pytest.approx(90.0)
    lmms = scores(tmp_path / "l", "textvqa", tmp_path, {"What Brand": "Nokia ASSISTANT: x"}, "lmms_eval")
    assert lmms["score"] == pytest.approx(90.0)
    assert lmms["prompt"].startswith("<image>What brand\n")
    parquet(tmp_path / "validation-00000-of-00003.parquet", [row | {"answers": ["a"]}])
    with pytest.raises(UserError, match="row 0: column 'answers' has 1 answers, not 10: is this the test split"):
        scores(tmp_path, "textvqa", tmp_path, {})


def test_tablevqabench_averages_parts_and_items(tmp_path: Path) -> None:
    parts = {
        "vwtq": ("a||b", "b|a"),
        "vwtq_syn": ("c", "d"),
        "vtabfact": ("It is true", "1"),
        "fintabnetqa": ("3 million", "3"),
    }
    rows = [
        {"qa_id": f"{part}{n}", "image": struct(), "question": f"{part}?", "gt": gold}
        for part, (_, gold) in parts.items()
        for n in range(3 if part == "vwtq_syn" else 1)
    ]
    for part in parts:
        parquet(
            tmp_path / "data" / f"{part}-00000-of-00001.parquet", [row for row in rows if row["question"] == f"{part}?"]
        )
    entry = scores(tmp_path, "tablevqabench", tmp_path, {f"{part}?": reply for part, (reply, _) in parts.items()})
    assert entry["score"] == 75.0
    assert entry["scores"]["mean of items"] == 50.0
    assert entry["scores"]["fintabnetqa (exact)"] == 0.0
    assert "Statement: vtabfact?\nAnswer:" in (tmp_path / "out" / "tablevqabench.jsonl").read_text().replace(
        "\\n", "\n"
    )

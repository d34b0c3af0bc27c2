"""Running benchmarks: resume, ranks, batches of like length, kept results, errors of one line, large files."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignvlm.errors import UserError
from alignvlm.evaluation.answering import Answerer
from alignvlm.evaluation.benchmarks import benchmark_names, find_benchmark
from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from alignvlm.evaluation.benchmarks.scoring import read_replies, score_rows
from alignvlm.system.ranks import Ranks
from data_pipeline.files import read_json_lines
from tests.evaluation.benchmarks.files import Known, lines, parquet, png, struct, tsv
from tests.evaluation.thread_ranks import ThreadRanks
from tests.fixtures.command import Command
from tests.tiny import tiny_model

NUMBER = 23
REPLIES = {f"{'long ' * (n % 5)}q{n}": "a" if n % 3 else "b" for n in range(NUMBER)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions of several lengths as a TSV."""
    rows = [
        {"index": n, "image": png(n, size=8 + n % 4), "question": question, "answer": "a", "split": "human"}
        for n, question in enumerate(REPLIES)
    ]
    return tsv(tmp_path / "ChartQA_TEST.tsv", rows)


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    entries = results["benchmarks"].items()
    return {name: {k: v for k, v in e.items() if k not in ("seconds", "replies_per_second")} for name, e in entries}


def run_two(data: Path, out: Path, answerers: Sequence[Answerer]) -> dict[str, Any]:
    """What two ranks write, as threads."""

    def run(ranks: Ranks) -> dict[str, Any]:
        jobs, answerer = [Job.of("chartqa", data, "lmms_eval")], answerers[ranks.rank]
        return run_benchmarks("model", jobs, out, batch_size=2, answerer=answerer, ranks=ranks)

    one, other = ThreadRanks(2).run(run)
    assert one == other
    return one


def test_two_ranks_give_what_one_gives(tmp_path: Path, data: Path) -> None:
    one, ranks = Known(REPLIES), [Known(REPLIES), Known(REPLIES)]
    job = Job.of("chartqa", data, "lmms_eval")
    alone = run_benchmarks("model", [job], tmp_path / "one", batch_size=2, answerer=one)
    two = run_two(data, tmp_path / "two", ranks)
    assert without_time(two) == without_time(alone)
    assert (tmp_path / "two" / "chartqa.jsonl").read_bytes() == (tmp_path / "one" / "chartqa.jsonl").read_bytes()
    assert sorted(ranks[0].batches + ranks[1].batches) == sorted(one.batches)
    assert all(len(rank.batches) > 2 for rank in ranks)


def test_rank_0_sees_for_all_what_is_done(tmp_path: Path, data: Path) -> None:
    """The other rank has no results.json yet, as a host may on a network file system; nobody answers again."""
    jobs = [Job.of("chartqa", data)]
    alone = run_benchmarks("model", jobs, tmp_path / "out", batch_size=2, answerer=Known(REPLIES))

    def run(ranks: Ranks) -> dict[str, Any]:
        out = tmp_path / ("out" if ranks.is_main else "nowhere")
        return run_benchmarks("model", jobs, out, answerer=Known({}), ranks=ranks)

    assert ThreadRanks(2).run(run) == [alone, alone]


def test_a_file_that_one_rank_cannot_read_ends_all_with_its_word(tmp_path: Path, data: Path) -> None:
    rows = data.read_text().splitlines(keepends=True)
    rows[13] = rows[13].replace("human", "human\tmore")  # row 12, of rank 1
    data.write_text("".join(rows))
    job = Job.of("chartqa", data)
    run = lambda each: run_benchmarks("m", [job], tmp_path / "out", batch_size=2, answerer=Known(REPLIES), ranks=each)
    one, other = ThreadRanks(2).run(run)
    assert isinstance(one, UserError)
    assert (type(one), str(one)) == (type(other), str(other))
    assert "ChartQA_TEST.tsv, row 12" in str(one)


def test_batches_hold_prompts_of_like_length(tmp_path: Path, data: Path) -> None:
    answerer = Known(REPLIES)
    run_benchmarks("model", [Job.of("chartqa", data)], tmp_path / "out", batch_size=4, answerer=answerer)
    areas = [[images[0].width for _, images, _ in map(answerer.asked.get, batch)] for batch in answerer.batches]
    assert [len(set(batch)) for batch in areas[:4]] == [1, 1, 1, 1]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, data: Path) -> None:
    class Dies(Known):
        def generate(self, items: Any, max_new_tokens: int, until: Any = ()) -> list[str]:
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().generate(items, max_new_tokens)

    first, second = Dies(REPLIES), Known(REPLIES)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks("model", [Job.of("chartqa", data)], tmp_path / "out", batch_size=4, answerer=first)
    part = next((tmp_path / "out" / "parts").rglob("*.jsonl"))
    with part.open("a") as file:
        file.write('{"index": 20, "id": "tor')  # the line at which it was killed
    result = run_benchmarks("model", [Job.of("chartqa", data)], tmp_path / "out", batch_size=4, answerer=second)
    whole = run_benchmarks("model", [Job.of("chartqa", data)], tmp_path / "all", batch_size=4, answerer=Known(REPLIES))
    assert without_time(result) == without_time(whole)
    assert not {key for batch in first.batches for key in batch} & {key for batch in second.batches for key in batch}
    assert not (tmp_path / "out" / "parts").exists() or not list((tmp_path / "out" / "parts").iterdir())


def test_valid_results_are_kept_and_others_made_again(tmp_path: Path, data: Path) -> None:
    out, answerer = tmp_path / "out", Known(REPLIES)
    run_benchmarks("model", [Job.of("chartqa", data)], out, answerer=answerer)
    asked = len(answerer.batches)
    run_benchmarks("model", [Job.of("chartqa", data)], out, answerer=answerer)
    assert len(answerer.batches) == asked
    result = run_benchmarks("model", [Job.of("chartqa", data, "lmms_eval")], out, answerer=answerer)
    assert len(answerer.batches) > asked
    assert result["benchmarks"]["chartqa"]["generation"]["max_new_tokens"] == 16
    assert {limit for *_, limit in answerer.asked.values()} == {16}


def test_results_of_another_model_are_not_kept(tmp_path: Path, data: Path) -> None:
    export, out = tmp_path / "export", tmp_path / "out"
    export.mkdir()
    (export / "model.safetensors").write_text("one")
    answerer = Known(REPLIES)
    run_benchmarks(export, [Job.of("chartqa", data)], out, answerer=answerer)
    pages = data.rename(data.with_name("DocVQA_VAL.tsv"))
    run_benchmarks(export, [Job.of("docvqa", pages)], out, answerer=answerer)
    assert set(json.loads((out / "results.json").read_text())["benchmarks"]) == {"chartqa", "docvqa"}
    (export / "model.safetensors").write_text("another")
    run_benchmarks(export, [Job.of("docvqa", pages)], out, answerer=answerer)
    assert set(json.loads((out / "results.json").read_text())["benchmarks"]) == {"docvqa"}


def test_replies_are_kept_raw_and_scored_again_without_a_model(tmp_path: Path, data: Path) -> None:
    replies = {question: f" {reply}\n" for question, reply in REPLIES.items()}
    out = tmp_path / "out"
    entry = run_benchmarks("model", [Job.of("chartqa", data)], out, answerer=Known(replies))["benchmarks"]["chartqa"]
    rows = read_replies(out / "chartqa.jsonl")
    assert [row["reply"] for row in rows] == list(replies.values())
    assert rows[1]["prompt"] == "<image>long q1\nAnswer the question using a single word or phrase."
    again = score_rows(find_benchmark("chartqa"), rows, "vlmevalkit")
    assert again["score"] == entry["score"] == pytest.approx(100 * sum(map("a".__eq__, REPLIES.values())) / NUMBER)
    assert again["interval"] == entry["interval"]
    assert entry["interval"][0] < entry["score"] < entry["interval"][1]
    assert entry["versions"]["alignvlm"]


def test_a_picture_that_cannot_be_decoded_is_named_and_counted(tmp_path: Path, caplog: Any) -> None:
    rows = [{"index": n, "image": image, "question": "q", "answer": "a"} for n, image in enumerate((png(), b"x" * 80))]
    data = tsv(tmp_path / "DocVQA_VAL.tsv", rows)
    out = tmp_path / "out"
    results = run_benchmarks("m", [Job.of("docvqa", data)], out, answerer=Known({"q": "a\u2028b"}))
    entry = results["benchmarks"]["docvqa"]
    assert (entry["items"], entry["unreadable"]) == (1, 1)
    assert entry["notes"][-1] == "1 of 2 questions could not be asked and do not count"
    assert [row["reply"] for row in read_replies(out / "docvqa.jsonl")] == ["a\u2028b"]  # one line all the same
    assert [row["id"] for row in read_json_lines(out / "docvqa.unusable.jsonl")] == ["1"]
    assert "1 questions could not be asked" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reply": None}, "line 2: not a stored reply; it has index (int), id (str), reply (str), gold (dict)"),
        ({"index": "1"}, "line 2: not a stored reply"),
        ({"index": 0}, "line 2: a second reply of index 0"),
        ({"gold": {"answers": []}}, "not of benchmark 'docvqa' (ValueError: answers must be a list"),
    ],
)
def test_damaged_replies_are_one_line(tmp_path: Path, command: Command, changed: dict[str, Any], message: str) -> None:
    row = {"index": 0, "id": "a", "reply": "a", "gold": {"answers": ["a"]}}
    file = lines(tmp_path / "docvqa.jsonl", [row, row | {"index": 1} | changed])
    assert message in command("score", file, code=2)


def mistakes(tmp_path: Path) -> list[tuple[str, Path, str]]:
    """(benchmark, data, the message)."""
    place = lambda name: tmp_path / name
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "nothing").mkdir()
    tsv(place("short.tsv"), [{"index": 1, "question": "q", "image": "abc", "answer": "a"}])
    tsv(place("noquestion.tsv"), [{"index": 1, "image": png(), "answer": "a"}])
    parquet(place("other.parquet"), [{"question": "q", "image": struct(), "label": "a"}])
    parquet(place("noimage.parquet"), [{"questionId": "1", "question": "q", "image": None, "answers": ["a"]}])
    parquet(place("splits/data/train-00000-of-00001.parquet"), [{"question": "q"}])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines(place("gone/test/DocVQA_test.jsonl"), [{"image": ["./imgs/a.png"], "messages": turns}])
    lines(place("odd_test.jsonl"), [{"image": ["a.png"], "messages": turns[:1]}])
    tsv(place("ChartQA_TEST_local.tsv"), [{"index": 1, "image_path": "a.png", "question": "q", "answer": "a"}])
    parquet(place("DocVQA/validation-0-of-1.parquet"), [{"questionId": "1", "question": "q", "image": struct()}])
    tsv(place("MMMU.tsv"), [{"index": 1, "image": png(), "question": "q", "answer": "A", "split": "test"}])
    return [
        ("docvqa", place("missing"), "missing: no such file or folder"),
        ("docvqa", place("empty.tsv"), "empty.tsv: the file is empty"),
        ("docvqa", place("empty.jsonl"), "empty.jsonl: the file is empty"),
        ("docvqa", place("bad.parquet"), "bad.parquet: not a parquet file"),
        ("docvqa", place("nothing"), "nothing: no files of benchmark 'docvqa' in a known layout"),
        ("docvqa", place("short.tsv"), "row 0: column 'image' is neither an image nor the index of a row: 'abc'"),
        ("docvqa", place("noquestion.tsv"), "noquestion.tsv: there is no column 'question', only index, image"),
        ("docvqa", place("other.parquet"), "row 0: there is no column 'answers', only question, image, label"),
        ("docvqa", place("noimage.parquet"), "row 0: column 'image' holds no image"),
        ("docvqa", place("splits"), "no parquet file of split validation of config 'DocVQA' among data/train-00000"),
        ("docvqa", place("gone"), "line 1: the image of column 'image' is not there"),
        ("docvqa", place("odd_test.jsonl"), "line 1: not a question with an image"),
        ("textvqa", place("gone"), "has the layout docdownstream; 'textvqa' is read from huggingface, vlmevalkit"),
        ("docvqa", place("ChartQA_TEST_local.tsv"), "its name is that of benchmark 'chartqa', not 'docvqa'; give"),
        ("wtq", place("gone/test/DocVQA_test.jsonl"), "its name is that of benchmark 'docvqa', not 'wtq'"),
        ("infovqa", place("DocVQA/validation-0-of-1.parquet"), "its folder is config 'DocVQA' of the dataset, not 'I"),
        ("mmmu", place("MMMU.tsv"), "row 0: column 'split' must be validation or dev, not 'test'"),
        ("mmmu", place("short.tsv"), "short.tsv: there is no column 'split', only index, question, image, answer"),
        ("seedbench", place("other.parquet"), "other.parquet: there is no column 'data_type', only question, image"),
        ("doqvqa", place("gone"), "unknown benchmark 'doqvqa': did you mean 'docvqa'"),
    ]


def test_mistakes_in_files_are_one_line_with_file_and_column(tmp_path: Path) -> None:
    for name, data, message in mistakes(tmp_path):
        with pytest.raises(UserError) as caught:
            run_benchmarks("model", [Job.of(name, data)], tmp_path / "out", answerer=Known({"q": "a"}))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_large_tsv_is_opened_at_once_and_read_row_by_row(tmp_path: Path) -> None:
    """Stands for 2 GB: time and memory do not grow with the file (60 MB here)."""
    image = "A" * 1_000_000
    with (tmp_path / "DocVQA_VAL.tsv").open("w") as file:
        file.write("index\timage\tquestion\tanswer\n")
        file.writelines(f"{n}\t{image}\tq{n}\ta\n" for n in range(60))
    tracemalloc.start()
    started = time.process_time()
    job = Job.of("docvqa", tmp_path)
    opened = time.process_time() - started
    count = sum(1 for _ in job.reader.records(lambda number: number % 2 == 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30
    assert opened < 0.5
    assert peak < 20e6


def test_every_benchmark_says_how_it_is_asked() -> None:
    for name in benchmark_names():
        benchmark = find_benchmark(name)
        assert benchmark.sources
        assert benchmark.flavours
        assert set(benchmark.flavours) <= {"vlmevalkit", "lmms_eval", "docowl", "official"}


def test_eval_and_score_as_commands(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model()
    model.save_pretrained("export")
    processor.save_pretrained("export")
    rows = [{"index": n, "image": png(n, 32), "question": "what is the total", "answer": "12"} for n in range(3)]
    tsv(Path("DocVQA_VAL.tsv"), rows)
    tsv(Path("ChartQA_TEST.tsv"), rows)
    call = (
        "eval",
        "export",
        "--benchmark",
        "docvqa",
        "--benchmark",
        "chartqa",
        "--data",
        ".",
        "--flavour",
        "lmms_eval",
    )
    printed = command(*call, "--batch-size", "2", "--device", "cpu")
    assert "DocVQA: vlmevalkit layout, DocVQA_VAL.tsv; flavour lmms_eval" in printed
    results = json.loads(Path("benchmarks/results.json").read_text())
    assert set(results["benchmarks"]) == {"docvqa", "chartqa"}
    assert results["benchmarks"]["docvqa"]["batch_size"] == 2
    assert "lmms_eval" in command("score", "benchmarks/docvqa.jsonl")  # as it was asked
    again = command("score", "benchmarks/docvqa.jsonl", "--flavour", "docowl")
    assert "docowl" in again
    assert command("score", "benchmarks/docvqa.jsonl", "--benchmark", "docvqa", "--flavour", "docowl") == again
    whole = Path("benchmarks/results.json").read_text()
    for damaged in (whole[:100], '{"model": "export", "benchmarks": []}'):
        Path("benchmarks/results.json").write_text(damaged)
        message = "benchmarks/results.json does not say in whose flavour docvqa was asked: give --flavour (vlmevalkit, "
        assert message in command("score", "benchmarks/docvqa.jsonl", code=2)
        assert command("score", "benchmarks/docvqa.jsonl", "--flavour", "docowl") == again
    Path("benchmarks/results.json").write_text(whole)
    words = ("--benchmark", "docvqa", "--data", "DocVQA_VAL.tsv", "--flavour", "lmms_eval", "--limit", "1")
    command("eval", "export", *words, "--device", "cpu")
    assert json.loads(Path("benchmarks-1/results.json").read_text())["benchmarks"]["docvqa"]["items"] == 1
    for line, message in (
        (("eval", "export", "--data", "."), "belong to --benchmark NAME"),
        (("eval", "export", "--benchmark", "docvqa"), "--benchmark docvqa needs its files: --data PATH"),
        (
            ("eval", "export", "--benchmark", "docvqa", "--data", ".", "--flavour", "lmmseval"),
            "did you mean 'lmms_eval'",
        ),
        (("eval", "export", *("--benchmark", "docvqa") * 2, "--data", "."), "one is given twice"),
        (("score",), "give either a file of stored replies, or --vectors FILE"),
        (("score", "DocVQA_VAL.tsv", "--benchmark", "docvqa"), "line 1: not a stored reply"),
        (("score", "benchmarks/docvqa.jsonl", "--benchmark", "deepform"), "are not of benchmark 'deepform'"),
        (("score", "benchmarks/docvqa.jsonl", "--judge", "DocVQA_VAL.tsv"), "docvqa is scored without a judge"),
    ):
        assert message in command(*line, code=2)

"""Published layouts: every row becomes its conversation with its image's bytes, or a line that says why not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.jsonl import read_jsonl
from data_pipeline.importers.layouts import LAYOUTS
from data_pipeline.importers.records import Rejected, open_dataset
from data_pipeline.importers.rows import json_rows
from data_pipeline.importers.rows.images import ImageFiles, row_image
from data_pipeline.samples.schema import SampleError
from tests.data_pipeline.published import (
    docdownstream,
    llava_pretrain,
    llava_row,
    parquet,
    pixmo_images,
    rows_of,
    save_to_disk,
    struct,
)
from tests.data_pipeline.tars import picture


def read(path: Path, **options: Any) -> tuple[str, list[Any]]:
    """(layout, records) of a dataset."""
    dataset = open_dataset(path, **options)
    records: list[Any] = []
    for file, prefix in zip(dataset.files, dataset.prefixes(), strict=True):
        records += dataset.reading.records(file, prefix, 0, 1000)
    return dataset.reading.format, records


def said(record: Any) -> list[list[str]]:
    """The texts of each turn, IMAGE for an image."""
    return [[part.get("text", "IMAGE") for part in message["content"]] for message in record["messages"]]


def why(record: Any) -> str:
    assert isinstance(record, Rejected), record
    return record.error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", [parquet, save_to_disk])
def test_every_layout_is_known_by_its_columns(layout: str, write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / ("train.parquet" if write is parquet else "saved"), rows_of(layout))
    name, records = read(path)
    assert name == layout
    assert [record["images"] for record in records] == [[picture(30, 20)], [picture(31, 20)]]  # bytes as they were
    for number, record in enumerate(records):
        user, assistant = said(record)
        assert assistant == [f"number {number}"]
        assert "IMAGE" in user
        assert layout == "captions" or f"What is {number}?" in "".join(user)
        assert not any(isinstance(value, bytes) for value in record.values())
        json.dumps({**record, "images": []})
    stem = "train" if write is parquet else "data-00000-of-00002"
    assert records[0]["key"] == f"{stem}-000000000"


@pytest.mark.parametrize("lines", [False, True])
def test_llava_lists_and_lines_with_images_in_an_archive(lines: bool, tmp_path: Path) -> None:
    file = llava_pretrain(tmp_path, lines=lines)
    name, records = read(file, images=tmp_path / "images.zip")
    assert name == "llava"
    assert [record["images"] for record in records] == [[picture(30 + i, 20)] for i in range(5)]
    assert said(records[3]) == [["IMAGE", "\nWhat is 3?"], ["number 3"]]
    assert records[3]["id"] == "000000003"
    assert "no such file in the archive" in why(
        read(file, images=tmp_path / "images.zip", columns={"image": "id"})[1][0]
    )


def test_docdownstream_and_its_marks(tmp_path: Path) -> None:
    name, records = read(docdownstream(tmp_path))
    assert name == "messages"
    assert said(records[2]) == [["IMAGE", "What is 2?"], ["number 2"]]
    assert records[2]["dataset_name"] == "DocVQA"


def test_pairs_become_one_conversation_and_empty_answers_are_rejected(tmp_path: Path) -> None:
    pairs = [{"user": "a?", "assistant": "a"}, {"user": "b?", "assistant": "b"}]
    rows = [
        {"images": [struct(30), struct(31)], "texts": pairs},
        {"images": [struct()], "texts": [{"user": "a?", "assistant": " "}]},
        {"images": [struct()], "texts": [{"user": "see <image> <image>", "assistant": "a"}]},
        {"images": [], "texts": pairs},
        {"images": [{"bytes": b"GIF", "path": None}], "texts": pairs},
        {"images": [{"bytes": None, "path": "../x.jpg"}], "texts": pairs},
        {"images": [{"bytes": None, "path": "s3://a:geheim@b/x.jpg"}], "texts": pairs},
    ]
    _, records = read(parquet(tmp_path / "a.parquet", rows))
    assert said(records[0]) == [["IMAGE", "IMAGE", "a?"], ["a"], ["b?"], ["b"]]
    assert why(records[1]) == "answer 0 is empty"
    assert "2 image placeholder(s) in the messages but 1 image(s)" in why(records[2])
    assert said(records[3])[0] == ["a?"]
    assert records[4]["images"] == [b"GIF"]  # the writer, which needs the format, rejects it
    assert "leaves its folder" in why(records[5])
    assert "'s3://a:***@b/x.jpg' is a URL; fetch images with img2dataset" in why(records[6])


def test_pixmo_points_urls_and_turns(tmp_path: Path) -> None:
    urls = [f"https://host/{i}" for i in range(3)]
    folder = pixmo_images(tmp_path / "images", urls)
    point = [{"x": 10.04, "y": 20.0}]
    rows = [
        {"image_url": urls[0], "label": 'a "b"', "points": point, "count": 1},
        {"image_url": urls[1], "label": "dog", "points": point * 2, "count": 2},
        {"image_url": urls[2], "label": "cat", "points": [], "count": 0},
        {"image_url": "https://host/gone", "label": "cat", "points": point, "count": 1},
    ]
    name, records = read(parquet(tmp_path / "points.parquet", rows), images=folder)
    assert name == "pixmo"
    assert said(records[0]) == [
        ["IMAGE", 'Point to: a "b"'],
        ['<point x="10.0" y="20.0" alt="a &quot;b&quot;">a &quot;b&quot;</point>'],
    ]
    assert said(records[1])[1] == ['<points x1="10.0" y1="20.0" x2="10.0" y2="20.0" alt="dog">dog</points>']
    assert said(records[2])[1] == ["There are none."]
    assert "No such file" in why(records[3])
    asked = [{"image_url": urls[0], "messages": ["what?", "a dog"]}]
    assert said(read(parquet(tmp_path / "qa.parquet", asked), images=folder)[1][0]) == [["IMAGE", "what?"], ["a dog"]]
    caption = [{"image_url": urls[0], "caption": "a dog", "transcripts": ["uh, a dog"]}]
    (record,) = read(parquet(tmp_path / "cap.parquet", caption), images=folder)[1]
    assert said(record) == [["IMAGE"], ["a dog"]]
    assert record["transcripts"] == ["uh, a dog"]


def test_documents_of_texts_and_images_in_turn(tmp_path: Path) -> None:
    rows = [
        {
            "texts": ["a", None, "b", "c", None, None, "d"],
            "images": [None, "1.jpg", None, None, "1.jpg", "1.jpg", None],
        },
        {"texts": ["a", None], "images": [None, None]},
        {"texts": ["a"], "images": [None]},
    ]
    (tmp_path / "1.jpg").write_bytes(picture())
    name, records = read(parquet(tmp_path / "a.parquet", rows))
    assert name == "interleaved"
    assert said(records[0]) == [["a", "IMAGE"], ["b", "c"], ["IMAGE", "IMAGE"], ["d"]]
    assert "not exactly one" in why(records[1])
    assert "no image" in why(records[2])
    infos = [{"image_name": "1.jpg", "matched_text_index": 1}]
    (tmp_path / "mmc4.jsonl").write_text(json.dumps({"text_list": ["a", "b"], "image_info": infos}))
    assert said(read(tmp_path / "mmc4.jsonl")[1][0]) == [["a", "IMAGE"], ["b"]]


def test_rows_that_img2dataset_did_not_fetch_are_rejected(tmp_path: Path) -> None:
    rows = rows_of("captions")
    rows[1] |= {"jpg": None, "status": "failed_to_download", "error_message": "HTTP Error 404"}
    _, records = read(parquet(tmp_path / "00000.parquet", rows), prompt="Describe it.")
    assert said(records[0]) == [["IMAGE", "Describe it."], ["number 0"]]
    assert why(records[1]) == "img2dataset did not fetch it: failed_to_download: HTTP Error 404"


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "human", "value": "[IMG] hm"}, {"role": "gpt", "value": "a"}], "pages": [struct()]}]
    path = parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"no known layout has the columns chat, pages; .*--columns"):
        read(path)
    name, records = read(path, columns={"images": "pages", "messages": "chat"})
    assert name == "messages"
    assert said(records[0]) == [["IMAGE", " hm"], ["a"]]
    assert "chat" not in records[0]
    with pytest.raises(DataError, match="no column 'chta' to read as 'messages': did you mean 'chat'"):
        read(path, columns={"messages": "chta"})
    with pytest.raises(DataError, match="unknown format 'lava': did you mean 'llava'"):
        read(path, format="lava", columns={"messages": "chat"})
    (tmp_path / "b.jsonl").write_text('{"question": "the answer", "answer": "asked", "n": 1}\n')
    records = read(tmp_path / "b.jsonl", columns={"question": "answer", "answer": "question"})[1]  # each other's names
    assert said(records[0]) == [["asked"], ["the answer"]]


def test_a_hub_folder_and_its_splits(tmp_path: Path) -> None:
    for name in ("ai2d/train-00000-of-00001", "b (c)/train-00000-of-00001", "b (c)/test-00000-of-00001"):
        parquet(tmp_path / "data" / f"{name}.parquet", rows_of("llava"))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train-0.parquet").write_bytes(b"half")
    with pytest.raises(DataError, match="has the splits test, train: say which one, such as split=train"):
        read(tmp_path)
    _, records = read(tmp_path, split="train")
    assert [record["key"] for record in records] == [
        f"data/{name}/train-00000-of-00001-00000000{i}" for name in ("ai2d", "b_c_") for i in range(2)
    ]
    with pytest.raises(DataError, match=r"no split 'dev' \(splits: test, train\)"):
        read(tmp_path, split="dev")


def test_dataset_dicts_of_save_to_disk(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "train", rows_of("messages"))
    save_to_disk(tmp_path / "test", rows_of("messages")[:1], files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(tmp_path, split="test")[1]) == 1
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(DataError, match="leaves its folder"):
        read(tmp_path, split="train")
    (tmp_path / "train" / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state.json cannot be read .*does not list"):
        read(tmp_path, split="train")


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_json_rows_are_cut_where_they_begin(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against json.loads of the whole file; every range is read by itself."""
    monkeypatch.setattr(json_rows, "_PIECE", piece)
    rows = [{"a": 'é[\\"{', "n": i, "b": [1, {"c": "}"}]} for i in range(40)]
    whole = json.dumps(rows, ensure_ascii=False)
    for text in (whole, "\ufeff " + json.dumps(rows, indent=1), "\n\n".join(map(json.dumps, rows)), "[]", ""):
        path = tmp_path / "rows.json"
        path.write_text(text, encoding="utf-8")
        cuts = list(json_rows.cut(path, 15))
        assert [row for cut in cuts for row in json_rows.read(path, *cut)] == (rows if len(text) > 9 else [])
    for damaged in (whole[:-1], whole[: len(whole) // 2], "[1, 2]", '[{"a": 1} x]'):
        (tmp_path / "rows.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(DataError, match=r"rows\.json.*(cut off|not a list of JSON objects)"):
            list(json_rows.cut(tmp_path / "rows.json", 15))


def test_a_long_string_is_not_looked_at_anew_with_every_piece_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may have 16 MB, which were 150 MB to look at."""
    path, pattern, looked_at = tmp_path / "rows.json", json_rows._TOKEN, list[int]()

    class Counting:
        def match(self, text: bytes, position: int) -> object:
            looked_at.append(len(text) - position)
            return pattern.match(text, position)

    monkeypatch.setattr(json_rows, "_TOKEN", Counting())
    monkeypatch.setattr(json_rows, "_PIECE", 1000)
    rows = [{"s": "b" * 100_000}, {"s": "c"}]
    path.write_text(json.dumps(rows))
    assert [row for cut in json_rows.cut(path, 15) for row in json_rows.read(path, *cut)] == rows
    assert sum(looked_at) < 8 * path.stat().st_size  # twice in each pass


def test_rows_of_a_list_that_are_too_long_leave_the_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a piece ends: in a string, behind a backslash, between brackets."""
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 60)
    long = {"s": 'a\\"]}[{' * 6, "t": "\\", "u": [{"v": ["}"]}] * 3, "é": '"'}
    rows = [{"n": 0}, long, {"n": 1, "s": '\\"{'}, long, long, {"n": 2}, {"s": "b" * 70}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    wanted = [row if len(json.dumps(row)) <= 60 else None for row in rows]
    assert wanted.count(None) == 4
    for piece in range(1, 80):
        monkeypatch.setattr(json_rows, "_PIECE", piece)
        for rows_per_cut in (1, 3, 100):
            cuts = list(json_rows.cut(tmp_path / "rows.json", rows_per_cut))
            found = [row for cut in cuts for row in json_rows.read(tmp_path / "rows.json", *cut)]
            assert [None if isinstance(row, SampleError) else row for row in found] == wanted, piece


def test_damage_and_strangers_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: "):
        read(tmp_path)
    for content, reason in (("", "no rows"), ("5\n", "first row cannot be read: not a JSON object")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            read(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.csv: rows are read from \.parquet"):
        read(tmp_path / "a.csv")
    lines = [json.dumps(llava_row(0)), "{", json.dumps({"conversations": 5})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "images.zip").write_bytes(b"no archive")
    assert [why(each)[:8] for each in read(tmp_path / "b.jsonl")[1]] == ["image '0", "not JSON", "not a li"]
    with pytest.raises(DataError, match=r"images\.zip cannot be read as a zip archive"):
        read(tmp_path / "b.jsonl", images=tmp_path / "images.zip")


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(json_rows, "_PIECE", 100)
    row = json.dumps(llava_row(0) | {"more": "a" * 2000})
    (tmp_path / "open.json").write_text('[{"a": "' + "a" * 5000)
    with pytest.raises(DataError, match=r"open\.json: the list .* is cut off after byte"):
        list(json_rows.cut(tmp_path / "open.json", 10))
    (tmp_path / "numbers.json").write_text("[" + "1.5, " * 5000)  # said at once, not at an end that it has not
    with pytest.raises(DataError, match=r"numbers\.json, byte 1: not a list of JSON objects"):
        list(json_rows.cut(tmp_path / "numbers.json", 10))
    for lines in (True, False):  # a row costs itself only
        texts = ['{"a": 1}', row, '{"a": 2}', row]
        (tmp_path / "rows.json").write_text("\n\n".join(texts) if lines else f"[{', '.join(texts)}]")
        cuts = list(json_rows.cut(tmp_path / "rows.json", 1))
        found = [row for cut in cuts for row in json_rows.read(tmp_path / "rows.json", *cut)]
        assert [each if isinstance(each, dict) else str(each) for each in found] == [
            {"a": 1}, "a row of more than 1,000 bytes", {"a": 2}, "a row of more than 1,000 bytes",
        ]  # fmt: skip
    monkeypatch.setattr("data_pipeline.importers.jsonl.MAX_JSON_BYTES", 1000)
    (tmp_path / "own.jsonl").write_text(f"\n{row}")
    with pytest.raises(DataError, match=r"own\.jsonl, line 2: more than 1,000 bytes"):
        list(read_jsonl(tmp_path / "own.jsonl"))
    monkeypatch.setattr("data_pipeline.importers.rows.images.MAX_IMAGE_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(10**6))
    files = ImageFiles(tmp_path / "images.zip")
    with pytest.raises(SampleError, match="1,000,000 bytes; at most 100 are read"):
        files.read("bomb.jpg")
    with pytest.raises(SampleError, match="leaves its folder"):
        files.read("../bomb.jpg")
    with pytest.raises(SampleError, match="image of 101 bytes"):
        row_image(bytes(101), files)

"""Files that no one should have published: every row is written, or named with its reason; never a traceback."""

from __future__ import annotations

import copy
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.files import read_json_lines
from data_pipeline.importers import read_records
from data_pipeline.importers.layouts import LAYOUTS
from data_pipeline.importers.records import open_dataset
from data_pipeline.preparation import write
from data_pipeline.preparation.engines import Local
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader, text_record
from data_pipeline.shards.writer import write_shards
from tests.data_pipeline.published import llava_pretrain, llava_row, parquet, rows_of, struct
from tests.data_pipeline.tars import picture, write_tar

DEEP = "@deep@"
WRONG = [
    None, 5, -1.5, True, "", "x", "<image>" * 300, "\x1b[2J\n", "a\ud800b", [], [None], [5], [[]], {}, {"a": 1}, [{}],
    {"path": None}, {"path": "../x"}, {"path": "a\0b"}, "/etc/passwd", "https://host/x.jpg", 10**30, float("nan"),
    [{"from": 5, "value": None}], [{"role": []}], [{"user": 1, "assistant": []}], {"question": ["a"], "answer": []},
    [{"x": "a", "y": None}], DEEP,
]  # fmt: skip
"""Values that may stand at any place of a row, and mostly should not."""
MORE: dict[str, list[dict[str, Any]]] = {
    "interleaved": [{"text_list": ["a", "b"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 1}]}],
    "pixmo": [
        {"image": "a.jpg", "image_url": "https://host/x", "label": "dog", "points": [{"x": 1.0, "y": 2.0}]},
        {"image": "a.jpg", "image_url": "https://host/x", "messages": ["hm?", "a"]},
        {"image": "a.jpg", "questions": [{"question": "hm?", "answer": "a"}]},
    ],
}
"""Further shapes that rows of a layout have."""
FOREIGN: list[Any] = [
    [{"from": "human", "value": "hm"}, {"from": "gpt", "value": "a"}],
    {"messages": [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": [{"type": "text"}]}]},
    {"texts": [{"user": "hm", "assistant": "a"}], "media": "image", "name": ["x"]},
    {"queries": ["hm"], "annotations": ["a"]},
    {"caption": "a"},
]
"""JSON members of foreign shards."""


def named(value: Any) -> Any:
    """A row as JSON has it: images are files."""
    if isinstance(value, dict):
        return "a.jpg" if "bytes" in value else {name: named(each) for name, each in value.items()}
    if isinstance(value, list):
        return [named(each) for each in value]
    return "a.jpg" if isinstance(value, bytes) else value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a row, as keys and numbers from outside in."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(row: Any) -> Iterator[str]:
    """The row as JSON, with each of its places wrong in every way, or missing."""
    for path in places(row):
        for wrong in (*WRONG, ...):
            new = copy.deepcopy(row)
            inside = new
            for key in path[:-1]:
                inside = inside[key]
            if wrong is ...:
                del inside[path[-1]]
            else:
                inside[path[-1]] = wrong
            for depth in (500, 5000) if wrong is DEEP else (1,):
                yield json.dumps(new).replace(f'"{DEEP}"', "[" * depth + "]" * depth)


def check_line(error: object) -> None:
    assert str(error).isprintable(), error
    assert 8 < len(str(error)) < 700, error


def complaint(work: Callable[[], object]) -> str:
    """The line that this ends with; "" where it ends well."""
    try:
        work()
    except (DataError, SampleError) as error:
        check_line(error)
        return str(error)
    return ""


def write_all(source: Path, out: Path, rows: int, **options: Any) -> tuple[int, list[dict[str, str]]]:
    """(samples, rejected rows) of a dataset; together they are all rows, each reason is a line."""
    written = write.write_dataset(open_dataset(source, **options), out, engine=Local(1))
    rejected = [json.loads(line) for file in sorted(out.glob("*.rejected.jsonl")) for line in file.open()]
    for row in rejected:
        check_line(row["error"])
    assert written.manifest.num_samples + len(rejected) == rows
    return written.manifest.num_samples, rejected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_wrong_value_at_every_place_of_a_row(layout: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    good = named(rows_of(layout)[0]) | {"more": [1]}
    lines = [json.dumps(good), *(line for row in (good, *MORE.get(layout, ())) for line in changed(row))]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "", '{"cut', "5"]))
    samples, rejected = write_all(tmp_path / "rows.jsonl", tmp_path / "out", len(lines) + 2, format=layout)
    assert len(lines) // 10 < samples < len(lines)
    assert len(rejected) > len(lines) // 10
    reader = SourceReader(tmp_path / "out")
    assert all(len(reader[number].messages) >= 2 for number in range(0, samples, 50))
    for line in lines[:: len(lines) // 100]:  # what `auto` makes of such a first row
        (tmp_path / "one.jsonl").write_text(line)
        complaint(lambda: open_dataset(tmp_path / "one.jsonl"))


def test_every_wrong_value_in_data_of_ones_own_stops_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "no.jpg").write_bytes(b"no image")
    turns = [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": "a"}]
    row = {"key": "k", "messages": turns, "images": ["a.jpg"], "answers": ["a"]}
    lines = [*changed(row), '{"messages": []', "\xff", json.dumps(row | {"images": ["no.jpg"]})]
    file, stopped = tmp_path / "rows.jsonl", []
    for number, line in enumerate(lines):
        file.write_bytes(line.encode("latin-1", errors="replace"))
        records = read_records(file, "jsonl")
        stopped += [complaint(lambda: write_shards(records, tmp_path / f"out{number}", num_processes=1))]  # noqa: B023
    assert all(not line or "rows.jsonl, line 1: " in line or "record 0 (" in line for line in stopped)
    assert 10 < stopped.count("") < len(lines) // 2
    assert all(stopped[-3:])
    file.write_text("\n")
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        list(read_records(file, "jsonl"))


def test_every_wrong_value_in_the_json_of_a_foreign_shard() -> None:
    members = [line.encode() for member in FOREIGN for line in changed(member)]
    found = [complaint(lambda: text_record({"json": member}, [(30, 20)])) for member in members]  # noqa: B023
    assert 20 < found.count("") < len(members) // 2


def strings(offsets: list[int], data: bytes) -> pa.Array:
    """An Arrow column of texts from its raw parts."""
    ends = pa.array(offsets, pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, ends, pa.py_buffer(data)])


COLUMNS = {
    "text that is not UTF-8": strings([0, 1, 2, 3], b"a\xffb"),
    "offsets outside of the data": strings([0, 1, 10**9, 3], b"abc"),
    "dates beyond the calendar": pa.array([0, 2**31 - 1, 0], pa.int32()).cast(pa.date32()),
    "durations beyond Python's": pa.array([0, 2**62, 0], pa.duration("s")),
    "one name twice": pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, names=["a", "a"]),
    "null": pa.nulls(3),
    "numbers": pa.array([1, 2, 3]),
    "maps": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "dictionaries": pa.array(["a", "b", "a"]).dictionary_encode(),
}


ONE_ROW = ("text that is not UTF-8", "dates beyond the calendar", "durations beyond Python's")
"""What is wrong with the second row only."""
NOT_PARQUET = ("offsets outside of the data", "one name twice")
"""pyarrow writes no such files."""


@pytest.mark.parametrize(
    ("column", "suffix"),
    [(column, "arrow") for column in COLUMNS]
    + [(column, "parquet") for column in COLUMNS if column not in NOT_PARQUET],
)
def test_columns_of_types_that_no_one_expects(column: str, suffix: str, tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": struct(), "question": "hm?", "answer": "a"} for i in range(3)]
    for name in ("question", "more"):
        table = pa.Table.from_pylist(rows)
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, COLUMNS[column])
        file = tmp_path / name / f"rows.{suffix}"
        file.parent.mkdir()
        if suffix == "parquet":
            pq.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        out = tmp_path / f"{name}-out"
        error = complaint(lambda: write_all(file, out, 3, format="questions"))  # noqa: B023
        if column in ONE_ROW and not error:
            (rejected,) = read_json_lines(out / "000000.rejected.jsonl")
            assert rejected["key"] == "rows-000000001"
        assert not error or "no row can be used" in error or "first row cannot be read" in error


def test_files_that_were_cut_off_or_changed(tmp_path: Path) -> None:
    rows = rows_of("finevision") * 10
    table = pa.Table.from_pylist(rows)
    parquet(tmp_path / "a.parquet", rows, group=5)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as ipc:
        ipc.write_table(table, max_chunksize=5)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        whole = (tmp_path / name).read_bytes()
        ends = [at for at in range(8, len(whole), 8) if whole[at : at + 4] == b"\xff" * 4]  # messages of Arrow begin
        for size in (0, 1, 5, len(whole) // 3, len(whole) - 8, len(whole) - 1, *ends):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(DataError, match=rf"{name} (is empty|is cut off|cannot be read).*download or") as caught:
                write.make_plan(open_dataset(tmp_path / name), 10, num_processes=1)
            check_line(caught.value)
        (tmp_path / name).write_bytes(whole)
        plan = write.plan_folder(open_dataset(tmp_path / name), tmp_path / "out" / name, 10, num_processes=1)
        plan.ranges[-1][2] += 1  # as if the file had lost a row since, which its size and its ends do not tell
        with pytest.raises(DataError, match=rf"{name}: 10 rows, not the 11 of write-plan"):
            write.write_missing(plan, tmp_path / "out" / name, engine=Local(1))


def test_archives_that_were_cut_off(tmp_path: Path) -> None:
    file, archive = llava_pretrain(tmp_path / "in"), tmp_path / "in" / "images.zip"
    whole = bytearray(archive.read_bytes())
    begin = whole.index(picture(32, 20))
    whole[begin : begin + 100] = bytes(100)
    archive.write_bytes(whole)
    _, rejected = write_all(file, tmp_path / "out", 5, images=archive)
    assert [row["key"][-1] for row in rejected] == ["2"]
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cut\.zip cannot be read as a zip archive"):
        write_all(file, tmp_path / "out2", 5, images=tmp_path / "cut.zip")
    write_tar(tmp_path / "tars" / "a.tar", [("a.jpg", picture()), ("a.txt", b"one"), ("b.txt", b"a" * 5000)])
    tar = (tmp_path / "tars" / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "tars" / "a.tar") as members:
        last = members.getmembers()[-1].offset_data
    for size in (last + 4000, last, last - 100):
        (tmp_path / "tars" / "a.tar").write_bytes(tar[:size])
        with pytest.raises(DataError, match=r"a\.tar: .* after 1 samples.*write or download the shard again") as caught:
            index_shards(tmp_path / "tars", num_processes=1)
        check_line(caught.value)


def test_a_row_that_cannot_be_read_costs_itself_even_when_it_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "0000").mkdir()
    lines = [b'{"conversations": "\xff"}', json.dumps(llava_row(0) | {"image": "0.jpg"}).encode()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "0.jpg").write_bytes(picture())
    samples, (rejected,) = write_all(tmp_path / "rows.jsonl", tmp_path / "out", 2)
    assert samples == 1
    assert rejected["error"].startswith("not JSON: 'utf-8' codec can't decode byte 0xff")

"""Files that outlive a crash, damage and a full disk: atomic writing, caches, records, and what is needed."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.files import (
    JsonLinesLog,
    files_below,
    has_shape,
    load_array,
    must_write,
    open_atomic,
    read_json,
    read_json_lines,
    read_needed,
    read_new_lines,
    read_or_make,
    save_array,
    to_json,
    write_atomic,
    write_json_lines,
)
from data_pipeline.shards.storage import open_storage
from tests.fixtures.damage import DAMAGES, full_disk


def test_text_bytes_and_arrays_replace_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    with open_atomic(path) as file:
        np.save(file, np.arange(3))
    assert np.load(path).tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable for others as any new file is"


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with open_atomic(path) as file:
            file.write(b"half of the n")
            assert path.read_text() == "old", "nothing is seen before the end"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys; from pathlib import Path; from data_pipeline.files import open_atomic\n"
        "with open_atomic(Path(sys.argv[1])) as file:\n    file.write(b'half'); file.flush(); os._exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 3
    assert path.read_text() == "old"


def test_writers_of_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_atomic(path, content), contents))
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_lines_come_back_and_the_cut_off_last_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"a": 1}, {"text": "é\n\u2028"}, {"x": [0.1, None]}]
    write_json_lines(path, rows)
    assert read_json_lines(path) == rows
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_json_lines(path) == rows[: whole[:size].count(b"\n")]


def test_remains_inside_a_file_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "b\n\x00\x00\n[3]\n\n{"a": 4}\n')
    assert read_json_lines(path) == [{"a": 1}, {"a": 4}]
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: left out 3 damaged line(s)")


def test_a_reader_that_follows_a_file_sees_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    text = "".join(json.dumps({"number": number}) + "\n" for number in range(20)).encode()
    seen, position = [], 0
    for end in range(0, len(text) + 1, 7):
        path.write_bytes(text[:end])
        with path.open("rb") as file:
            rows, position = read_new_lines(file, position)
        seen += rows
    path.write_bytes(text)
    with path.open("rb") as file:
        seen += read_new_lines(file, position)[0]
    assert [row["number"] for row in seen] == list(range(20))


def test_records_that_are_missing_are_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []
    assert read_json(tmp_path / "none.json") == {}
    assert not caplog.messages
    (tmp_path / "folder.jsonl").mkdir()
    assert read_json_lines(tmp_path / "folder.jsonl") == []
    assert "Is a directory" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_records_are_read_as_far_as_they_can_be(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"stage": "a", "step": step} for step in range(9)]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    whole = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(DAMAGES[damage](whole))
    found = read_json_lines(tmp_path / "rows.jsonl", {"stage": str, "step": int})
    assert all(row in rows for row in found)
    assert len(found) == {"cut": 4, "NULs at the end": 9, "NULs in the middle": 8}.get(damage, 0)
    assert len(caplog.messages) <= 1
    caplog.clear()
    (tmp_path / "one.json").write_bytes(DAMAGES[damage](b'{"stage": "a", "step": 3}'))
    assert read_json(tmp_path / "one.json", {"stage": str, "step": int}) == {}
    (warning,) = caplog.messages
    assert str(tmp_path / "one.json") in warning


def test_files_below_a_folder_are_found_behind_links_too(tmp_path: Path) -> None:
    """A dataset may be put together of links; one that leads back above is not followed without end."""
    for name in ("in/b/x.tar", "in/a.tar", "elsewhere/deep/y.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"linked": "../elsewhere", "b/top": "../../in", "again": "b", "c.tar": "a.tar", "gone.tar": "x"}
    for link, to in links.items():
        (tmp_path / "in" / link).symlink_to(to)
    (tmp_path / "elsewhere" / "back").symlink_to("../in")
    names = [path.relative_to(tmp_path / "in").as_posix() for path in files_below(tmp_path / "in")]
    assert names == ["a.tar", "again/x.tar", "b/x.tar", "c.tar", "gone.tar", "linked/deep/y.tar"]
    assert list(open_storage(tmp_path / "in").list(".tar")) == names
    assert files_below(tmp_path / "none") == []
    with pytest.raises(DataError, match=r"gone\.tar.*No such file"):  # a disk that is not there, say
        open_storage(tmp_path / "in").open("gone.tar")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Its shards were left out in silence."""
    (tmp_path / "a").mkdir()
    scan = os.scandir

    def scandir(path: str) -> Any:
        if os.fspath(path).endswith("/a"):
            raise OSError(error, os.strerror(error), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"/a: its files cannot be listed: {os.strerror(error)}"):
        files_below(tmp_path)


def test_shapes_of_json() -> None:
    shape = {
        "name": str,
        "score": float,
        "tags?": [str],
        "by_stage?": {str: int},
        "even?": lambda value: value % 2 == 0,
    }
    good = {"name": "x", "score": 1, "tags": ["a"], "by_stage": {"joint": 3}, "even": 4, "more": None}
    assert has_shape(good, shape)
    assert has_shape({"name": "x", "score": 0.5, "tags": None}, shape)
    for wrong in (
        {"name": 1}, {"score": "1"}, {"score": True}, {"score": None}, {"tags": "a"}, {"tags": [1]},
        {"by_stage": {"joint": 0.5}}, {"by_stage": {"joint": 1 << 63}}, {"by_stage": []}, {"even": 3},
    ):  # fmt: skip
        assert not has_shape(good | wrong, shape), wrong
    assert not has_shape({"name": "x"}, shape)
    assert not has_shape([good], shape)


OTHER_NUMBERS: dict[str, Callable[[bytes], bytes]] = {
    "other numbers": lambda data: data.replace(np.int64(7).tobytes(), np.int64(8).tobytes()),
    "no checksum": lambda data: data[:-16],
}


@pytest.mark.parametrize("damage", [*(name for name in DAMAGES if name != "wrong types"), *OTHER_NUMBERS])
def test_a_damaged_cache_is_made_anew_with_one_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "numbers.npy"
    array = np.arange(12).reshape(6, 2)

    def make() -> np.ndarray:
        save_array(path, array)
        return array

    def get() -> list[list[int]]:
        return read_or_make(path, lambda path: load_array(path, np.int64, (6, 2)), make).tolist()

    assert get() == array.tolist()  # there is none yet
    assert np.load(path).tolist() == array.tolist()
    whole = path.read_bytes()
    path.write_bytes((DAMAGES | OTHER_NUMBERS)[damage](whole))
    assert path.read_bytes() != whole
    assert not caplog.messages
    assert get() == array.tolist()
    assert path.read_bytes() == whole
    assert get() == array.tolist()
    (warning,) = caplog.messages
    assert f"{path} cannot be read and is made anew" in warning


def test_an_array_of_another_shape_or_type_or_with_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npy"
    save_array(path, np.zeros((6, 2), dtype=np.uint32))
    for dtype, shape in ((np.int64, (6, 2)), (np.uint32, (2, 6)), (np.uint32, (12,))):
        with pytest.raises(ValueError, match=r"it holds uint32 \(6, 2\), not"):
            load_array(path, dtype, shape)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="checksum"):
        load_array(path, object, (1,))
    with path.open("ab") as file:
        file.write(b"\ncrc32 %08x\n" % zlib.crc32(path.read_bytes()))
    with pytest.raises(ValueError, match="Python objects"):
        load_array(path, object, (1,))


def test_a_cache_of_something_else_is_made_anew_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("of something else")
    assert read_or_make(tmp_path / "cache", lambda path: None, lambda: 3) == 3
    assert not caplog.messages


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_what_is_needed_and_damaged_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "needed.json"
    if damage != "missing":
        path.write_bytes(DAMAGES[damage](b'{"a": 1}'))
    with pytest.raises(DataError) as caught:
        read_needed(path, lambda path: 1 / (json.loads(path.read_bytes())["a"] == 1), "copy it again")
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("); copy it again")
    assert "\n" not in message


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/x cannot be written \(Not a directory\); give another"):  # noqa: SIM117
        with must_write(tmp_path / "file" / "x", "give another"):
            write_atomic(tmp_path / "file" / "x", "text")


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": -1}\n{"step": 0, "lo')  # a crash cut the last line off
    log = JsonLinesLog(path)
    rows = [{"step": step, "loss": 0.125} for step in range(60)]
    with full_disk(1000):
        for row in rows[:40]:
            log.append(row)
    assert path.stat().st_size == 1000
    assert len(caplog.messages) == 1
    assert "its lines wait in memory" in caplog.messages[0]
    for row in rows[40:]:
        log.append(row)
    log.close()
    assert read_json_lines(path) == [{"step": -1}, *rows]
    with full_disk(path.stat().st_size):
        again = JsonLinesLog(path)
        again.append(rows[0])
        again.close()
    assert "1 line(s) could not be written and are lost" in caplog.messages[-1]


def test_text_that_utf8_cannot_hold_is_written_as_its_escape(tmp_path: Path) -> None:
    rows = [{"text": "\udc80 é"}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_json_has_no_nan_and_no_infinity(tmp_path: Path) -> None:
    values = {"a": math.inf, "b": [-math.inf, {"c": (math.nan, 1.5)}], "d": np.float64("nan"), "e": True, "f": "NaN"}
    expected = {"a": None, "b": [None, {"c": [None, 1.5]}], "d": None, "e": True, "f": "NaN"}
    strict = lambda text: json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert strict(to_json(values, indent=1)) == expected
    log = JsonLinesLog(tmp_path / "log.jsonl")
    log.append(values)
    log.close()
    write_json_lines(tmp_path / "rows.jsonl", [values])
    for name in ("log.jsonl", "rows.jsonl"):
        assert strict((tmp_path / name).read_text()) == expected

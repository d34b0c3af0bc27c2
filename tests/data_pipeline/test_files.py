"""Atomic writing and JSON lines: a crash at any moment leaves the old file, and a cut-off line hides no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files import open_atomic, read_json_lines, read_new_lines, write_atomic, write_json_lines


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
    assert [str(path) in record.getMessage() for record in caplog.records] == [True] * 3


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


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json_lines(tmp_path / "none.jsonl")

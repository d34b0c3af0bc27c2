"""The timeline of a job: sections as they begin, its end also after an error, nothing on other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from alignvlm.run_folder import TIMELINE_LINE
from alignvlm.system.timeline import STARTED, Timeline, job_start
from data_pipeline.files import read_json_lines


def test_a_section_is_noted_when_it_begins_and_the_end_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path, 100.0, 105.0, last_beat=90.0)
    with suppress(ValueError), timeline:
        timeline.enter("steps")
        with timeline.during("save"):
            assert read_json_lines(path)[-1]["section"] == "save"
        raise ValueError
    timeline.end()
    with Timeline(path, 200.0, 201.0, last_beat=None) as timeline:
        timeline.finished = True
    rows = read_json_lines(path, TIMELINE_LINE)
    assert [row["section"] for row in rows] == [
        "imports", "prepare", "steps", "save", "steps", "end", "imports", "prepare", "end",
    ]  # fmt: skip
    assert [row["time"] for row in rows[:2]] == [100.0, 105.0]
    assert rows[0]["host"] == os.uname().nodename
    assert rows[0]["last_beat"] == 90.0
    assert [row["finished"] for row in rows if row["section"] == "end"] == [False, True]
    assert time.time() - 60 < rows[2]["time"] <= rows[3]["time"] <= time.time()


def test_other_ranks_note_nothing(tmp_path: Path) -> None:
    with Timeline() as timeline, timeline.during("save"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_job_begins_with_its_process_or_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import time; print(time.time()); from alignvlm.system.timeline import job_start; print(job_start())"
    began = time.time()
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    running, start = map(float, shown.split())
    assert began - 0.05 <= start <= running
    monkeypatch.setenv(STARTED, "12.5")
    assert job_start() == 12.5
    monkeypatch.setenv(STARTED, "soon")
    assert job_start() > 1e9

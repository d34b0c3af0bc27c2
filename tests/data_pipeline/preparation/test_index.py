"""Indexing and measuring in one pass: the same files as one after the other, shared by jobs, after a kill too."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation import index
from data_pipeline.preparation.engines import Local
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import measure_source, open_source
from tests.data_pipeline.tars import picture, write_tar
from tests.fixtures.command import Command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of captions and conversations, two samples of which cannot be used."""
    for shard in range(6):
        members = []
        for i in range(5):
            members += [(f"{i}.jpg", picture(20 + i, 20)), (f"{i}.txt", b"a" * (shard * 5 + i))]
        turns = [{"from": "human", "value": "hm"}, {"from": "gpt", "value": "a" * shard}]
        members += [("text.json", json.dumps(turns).encode())] + [("bad.json", b"{")] * (shard in (1, 4))
        write_tar(tmp_path / "src" / "sub" / f"{shard}.tar", members)
    return tmp_path / "src"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_pass_makes_the_files_that_two_make(folder: Path, tmp_path: Path, encoder: Any) -> None:
    job = index.open_job(folder, [index.Measuring(encoder, "Describe."), index.Measuring(encoder)])
    assert index.index_missing(job, engine=Local(1)) == 6
    index.finish(job, num_processes=1)
    at_once = contents(folder)
    for name in at_once:
        if not name.endswith(".tar"):
            (folder / name).unlink()
    index_shards(folder, num_processes=1)
    for prompt in ("Describe.", ""):
        measure_source(folder, encoder, prompt, num_processes=1)
        assert len(open_source("s", folder, encoder, prompt).unusable) == 3  # the empty caption among them
    assert contents(folder) == at_once
    again = index.open_job(folder, job.measurings)
    assert index.index_missing(again, engine=Local(1)) == 0


def test_jobs_that_share_the_shards(folder: Path, encoder: Any) -> None:
    job = index.open_job(folder, [index.Measuring(encoder)])
    done = [index.index_missing(job, task=task, tasks=4, engine=Local(1)) for task in (3, 1, 0)]
    assert done == [1, 2, 2]
    with pytest.raises(DataError, match=r"1 of 6 shards are not done \(sub/2\.tar is the first\)"):
        index.finish(job, num_processes=1)
    lengths = next(folder.rglob("0.lengths-*.jsonl"))
    lengths.write_text(lengths.read_text()[10:])  # as a write that was cut off would leave it, were it not atomic
    assert index.index_missing(job, engine=Local(2)) == 2
    manifest = index.finish(job, num_processes=1)
    assert manifest.num_samples == 38
    source = open_source("s", folder, encoder)
    assert source.measures[:, 0].tolist()[:6] == [0, 5, 6, 7, 8, 2]
    assert not list(folder.rglob("*.lengths-*"))


def test_a_kill_while_it_finishes_leaves_nothing_behind(
    folder: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurings = [index.Measuring(encoder)]
    job = index.open_job(folder, measurings)
    index.index_missing(job, engine=Local(1))
    (folder / "sub" / f".0.index.jsonl.{'0' * 32}.tmp").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(index, "_remove_leftovers", lambda job: os._exit(9))
        process = multiprocessing.get_context("fork").Process(target=index.finish, args=(job,))
        process.start()
        process.join()
    assert process.exitcode == 9
    assert len(list(folder.rglob("*.lengths-*"))) == 6
    again = index.open_job(folder, measurings)
    assert index.index_missing(again, engine=Local(1)) == 0
    assert index.finish(again, num_processes=1).num_samples == 38
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".tar", ".jsonl", ".json", ".npy"}
    assert not list(folder.rglob("*.lengths-*"))
    assert not list(folder.rglob(".*"))
    assert len(open_source("s", folder, encoder)) == 38


def test_shards_that_came_later_are_measured_too(folder: Path, encoder: Any, command: Command) -> None:
    measurings = [index.Measuring(encoder)]
    job = index.open_job(folder, measurings)
    index.index_missing(job, engine=Local(1))
    index.finish(job, num_processes=1)
    write_tar(folder / "z.tar", [("a.jpg", picture()), ("a.txt", b"late")])
    job = index.open_job(folder, measurings)
    index.index_missing(job, engine=Local(1))
    assert index.finish(job, num_processes=1).num_samples == 39
    assert open_source("s", folder, encoder).measures[-1].tolist() == [8, 1]
    assert "39 samples in 7 shards" in command("data", "index", folder, "--tasks", "2", "--task", "1") + command(
        "data", "index", folder, "--finish"
    )
    assert len(SourceReader(folder)) == 39
    with pytest.raises(DataError, match="no such folder"):
        index.open_job(folder / "none")

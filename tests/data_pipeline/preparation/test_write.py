"""Published data as shards: the same bytes by one process, by jobs that share it, and after a kill at any place."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.records import open_dataset
from data_pipeline.preparation import write
from data_pipeline.preparation.engines import Local, run, share
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.verify import verify_folder
from tests.data_pipeline.published import llava_pretrain, llava_row, parquet, struct
from tests.data_pipeline.tars import picture
from tests.fixtures.command import Command


def row(number: int) -> dict[str, Any]:
    answer = "" if number % 10 == 7 else f"number {number}"
    return {"images": [struct(20 + number)], "texts": [{"user": f"What is {number}?", "assistant": answer}]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 rows in two parquet files of row groups of five; every tenth has an empty answer."""
    for part in range(2):
        parquet(tmp_path / "in" / "sub.set" / f"train-{part}.parquet", [row(20 * part + i) for i in range(20)], group=5)
    return tmp_path / "in"


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dataset_becomes_shards_and_every_row_is_accounted_for(
    source: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    words = ("data", "write", out, "--from", source, "--samples-per-shard", "10")
    assert "40 rows would be written as 4 shards" in command(*words, "--dry-run")
    assert not list(tmp_path.glob("out*"))
    said = command(*words)
    assert f"{source}: 2 file(s), read as finevision (images, texts)" in said
    assert "36 samples in 4 shards" in said
    assert "4 rows were rejected" in said
    assert "4 x answer 0 is empty" in said
    reader = SourceReader(out)
    assert [reader[i].key for i in (0, 35)] == [f"sub_set/train-{n}-{i:09d}" for n, i in ((0, 0), (1, 19))]
    entry = reader.entry(10)
    assert reader.read(entry)["0.jpg"] == picture(31, 20)  # number 11: the bytes of the file
    assert verify_folder(out, decode=True, num_processes=1) == []
    rejected = [json.loads(line) for line in (out / "000002.rejected.jsonl").read_text().splitlines()]
    assert rejected == [
        {"key": "sub_set/train-1-000000007", "file": "sub.set/train-1.parquet", "error": "answer 0 is empty"}
    ]
    before = contents(out)
    assert "36 samples in 4 shards" in command(*words)
    assert contents(out) == before  # nothing to do
    assert "of other arguments" in command(*words, "prompt=hm", code=2)
    assert "the options of --from are prompt, split" in command(*words, "promt=hm", code=2)


def test_jobs_that_share_the_work_give_the_same_bytes(source: Path, tmp_path: Path, command: Command) -> None:
    size = ("--samples-per-shard", "5", "--processes", "1")
    command("data", "write", tmp_path / "one" / "mine", "--from", source, *size)
    words = ("data", "write", tmp_path / "many" / "mine", "--from", source, *size)
    for task in (3, 0, 2, 7, 6, 5, 4):
        command(*words, "--tasks", "8", "--task", str(task))
    assert "1 of 8 shards are missing (000001.tar is the first)" in command(*words, "--finish", code=2)
    assert not (tmp_path / "many" / "mine").exists()
    assert "task 1 of 8 wrote 1 shards" in command(*words, "--tasks", "8", "--task", "1")
    assert "36 samples in 8 shards" in command(*words, "--finish")
    assert contents(tmp_path / "many" / "mine") == contents(tmp_path / "one" / "mine")
    for late in (("--finish",), ("--tasks", "8", "--task", "1")):  # a job that the scheduler starts again
        assert "36 samples in 8 shards" in command(*words, *late)
    assert "belong together" in command(*words, "--tasks", "8", code=2)
    assert "with --tasks 2 the jobs are 0 to 1" in command(*words, "--tasks", "2", "--task", "2", code=2)
    assert "three ways" in command(*words, "--finish", "--ray", code=2)


def test_a_kill_costs_the_shards_that_were_being_written_and_no_other(source: Path, tmp_path: Path) -> None:
    dataset, out = open_dataset(source), tmp_path / "out"
    plan = write.plan_folder(dataset, out, 2, num_processes=1)
    place = partial_folder(out)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=write.write_missing, args=(plan, out), kwargs={"engine": Local(1)})
    process.start()
    while len(list(place.glob("*.index.jsonl"))) < 3:
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (place / ".000019.tar.0123.tmp").write_bytes(b"half")
    done = {path.name: path.stat().st_mtime_ns for path in place.glob("*.index.jsonl")}
    assert write.write_missing(plan, out, engine=Local(2)) == len(plan.ranges) - len(done)
    assert {name: (place / name).stat().st_mtime_ns for name in done} == done
    assert write.finish(plan, out).manifest.num_samples == 36
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert verify_folder(out, num_processes=1) == []


def test_of_ten_thousand_shards_those_that_are_there_cost_one_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of 200 was killed in the middle: its rerun, and one of everything, looks at nothing else."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(picture())
    line = json.dumps(llava_row(0) | {"image": "0.jpg"}) + "\n"
    for file in range(100):
        (tmp_path / "in" / f"{file:03d}.jsonl").write_text(line * 100)
    dataset, out = open_dataset(tmp_path / "in"), tmp_path / "out"
    plan = write.plan_folder(dataset, out, 1, num_processes=1)
    place, left = partial_folder(out), share(plan.tasks(), 7, 200)[20:]
    names = {task.shard for task in left}
    for task in plan.tasks():
        if task.shard not in names:
            (place / task.shard).touch()
            (place / task.shard.replace(".tar", ".index.jsonl")).touch()
    calls: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(os, name)

        def call(path: Any, *args: Any, **options: Any) -> Any:
            calls.extend([name] * str(path).startswith(str(place)))
            return function(path, *args, **options)

        return call

    class Found(Exception):
        pass

    def engine(function: Any, tasks: Any) -> Any:
        raise Found(tasks)

    for name in ("listdir", "scandir", "stat", "lstat", "open"):
        monkeypatch.setattr(os, name, counted(name))
    for part in ({"task": 7, "tasks": 200}, {}):
        calls.clear()
        with pytest.raises(Found) as found:
            write.write_missing(plan, out, engine=engine, **part)  # type: ignore[arg-type]
        assert found.value.args[0] == left
        assert calls == ["listdir"]
    assert (len(plan.tasks()), len(left)) == (10_000, 30)
    assert write.write_missing(plan, out, task=7, tasks=200, engine=Local(1)) == 30
    assert all((place / name).stat().st_size for name in names)


def test_a_damaged_file_does_not_stop_the_others(source: Path, tmp_path: Path) -> None:
    file = source / "sub.set" / "train-1.parquet"
    whole = file.read_bytes()
    plan = write.plan_folder(open_dataset(source), tmp_path / "out", 10, num_processes=1)
    file.write_bytes(whole[:2000] + b"\0" * 2000 + whole[4000:])
    with pytest.raises(DataError, match=r"train-1.*\(\d of 4 tasks failed; the others are done and kept\)"):
        write.write_missing(plan, tmp_path / "out", engine=Local(1))
    file.write_bytes(whole + b"PAR1")
    with pytest.raises(DataError, match="has changed since write-plan"):
        write.write_missing(plan, tmp_path / "out", engine=Local(1))
    file.write_bytes(whole)
    assert write.write_missing(plan, tmp_path / "out", engine=Local(1)) <= 2
    assert write.finish(plan, tmp_path / "out").rejected == {"answer 0 is empty": 4}


def test_all_files_that_keep_shards_from_being_cut_are_named_at_once(source: Path, tmp_path: Path) -> None:
    dataset = open_dataset(source)
    for file in dataset.files:
        file.write_bytes(file.read_bytes()[:-9])  # an interrupted download
    names = "sub.set/train-0.parquet, sub.set/train-1.parquet"
    with pytest.raises(DataError, match=rf"train-0.* cannot be read: .*\(2 of 2 files are damaged: {names}\)"):
        write.plan_folder(dataset, tmp_path / "out", 10, num_processes=1)


def test_plans_of_other_data_and_damaged_ones_are_refused(source: Path, tmp_path: Path) -> None:
    write.plan_folder(open_dataset(source), tmp_path / "out", 10, num_processes=1)
    with pytest.raises(DataError, match="holds shards of another dataset"):
        write.plan_folder(open_dataset(source), tmp_path / "out", 5, num_processes=1)
    other = open_dataset(llava_pretrain(tmp_path / "llava"), images=tmp_path / "llava" / "images.zip")
    with pytest.raises(DataError, match="was planned for other files"):
        write.plan_folder(other, tmp_path / "out", 10, num_processes=1)
    plan = partial_folder(tmp_path / "out") / "write-plan.json"
    plan.write_text(plan.read_text()[:100])
    with pytest.raises(DataError, match=r"write-plan\.json cannot be read .*delete the folder"):
        write.plan_folder(open_dataset(source), tmp_path / "out", 10, num_processes=1)
    bad = parquet(tmp_path / "bad.parquet", [row(7)])
    with pytest.raises(DataError, match="no row can be used; the most frequent reason: answer 0 is empty"):
        write.write_dataset(open_dataset(bad), tmp_path / "none")


def die(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(DataError, match="a process was killed, perhaps for its memory"):
        run(die, range(8), Local(2), title="die")
    assert sorted(task for part in range(3) for task in share(range(10), part, 3)) == list(range(10))

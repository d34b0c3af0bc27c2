"""Writes a published dataset as shards: one task per shard, in any order, by any number of processes and machines.

Everything lies in `<folder>.partial` until the last shard is there; then `finish` writes the manifest, last, and gives
the folder its name. A shard is done when its index lies beside it: a task that was killed leaves nothing that counts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import must_write, open_atomic, read_json_lines, write_atomic, write_json_lines
from data_pipeline.importers.records import Dataset, Reading, Rejected
from data_pipeline.preparation.engines import Engine, Local, run, share
from data_pipeline.preparation.work_plan import PLAN, Task, WorkPlan, content_of, load_plan, make_plan, shared_plan
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_digest, scan_shard
from data_pipeline.shards.manifest import Manifest, ShardInfo, load_manifest
from data_pipeline.shards.sidecars import index_name
from data_pipeline.shards.storage import LocalStorage
from data_pipeline.shards.writer import to_members

__all__ = ["finish", "is_written", "make_plan", "plan_folder", "write_dataset", "write_missing"]
_WAY_OUT = "choose a folder that can be written and has room"


@dataclass(frozen=True)
class Written:
    """What was written: the manifest, and how many rows were rejected for which reasons, most frequent first."""

    manifest: Manifest
    rejected: dict[str, int] = field(default_factory=dict)


def rejected_name(shard: str) -> str:
    """Name of the file with the rows that could not go into a shard."""
    return f"{shard.removesuffix('.tar')}.rejected.jsonl"


def partial_folder(folder: Path) -> Path:
    """Where shards lie until all of them are there."""
    return folder.with_name(f"{folder.name}.partial")


def write_dataset(
    dataset: Dataset,
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Written:
    """Write what is missing, and finish. Raises DataError when a file cannot be read; what is done stays done."""
    folder = folder.absolute()
    if is_written(folder):
        return _already(dataset, folder, samples_per_shard)
    plan = plan_folder(dataset, folder, samples_per_shard, progress=progress)
    write_missing(plan, folder, engine=engine, progress=progress)
    return finish(plan, folder)


def is_written(folder: Path) -> bool:
    """Whether an earlier call has finished the folder."""
    return (folder / PLAN).exists()


def plan_folder(
    dataset: Dataset,
    folder: Path,
    samples_per_shard: int,
    *,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> WorkPlan:
    """The plan of a folder's shards, made when it is not there. Raises DataError when the folder is not empty."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another folder or delete it")
    place = partial_folder(folder)
    return shared_plan(place, dataset, samples_per_shard, num_processes=num_processes, progress=progress)


def write_missing(
    plan: WorkPlan,
    folder: Path,
    *,
    task: int = 0,
    tasks: int = 1,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> int:
    """Write the shards of part `task` of `tasks` that are not there; returns how many. Raises DataError."""
    place = partial_folder(folder.absolute())
    mine = share(plan.tasks(), task, tasks)
    names = set(os.listdir(place))
    missing = [each for each in mine if not names.issuperset((each.shard, index_name(each.shard)))]
    there = f" ({len(mine) - len(missing)} shards are there)" if len(missing) < len(mine) else ""
    title = f"write {folder.name}{there}"
    run(partial(write_shard, place, plan.dataset.reading), missing, engine or Local(), title=title, progress=progress)
    return len(missing)


def write_shard(folder: Path, reading: Reading, task: Task) -> None:
    """One shard with its index, which is written last, and its rejected rows. Raises DataError."""
    from webdataset import TarWriter

    if content_of(task.file) != task.input.content:
        raise DataError(f"{task.file} has changed since {PLAN} was made; delete {folder} and write it again")
    target, rejected, written = folder / task.shard, [], 0
    with (
        must_write(target, _WAY_OUT),
        open_atomic(target) as file,
        TarWriter(file, mtime=0, format="PAX_FORMAT", compress=False) as writer,
    ):
        for record in reading.records(task.file, task.input.prefix, task.begin, task.end, task.offset):
            sample = _members(record)
            if isinstance(sample, Rejected):
                rejected.append({"key": sample.key, "file": task.input.name, "error": sample.error})
            else:
                writer.write(sample)
                written += 1
        if written + len(rejected) != task.end - task.begin:
            raise DataError(f"{task.file}: {written + len(rejected)} rows, not the {task.end - task.begin} of {PLAN}")
    with must_write(target, _WAY_OUT):
        if rejected:
            write_json_lines(folder / rejected_name(task.shard), rejected)
        else:
            (folder / rejected_name(task.shard)).unlink(missing_ok=True)
        write_atomic(folder / index_name(task.shard), scan_shard(LocalStorage(str(folder)), task.shard))


def finish(plan: WorkPlan, folder: Path) -> Written:
    """The manifest of all shards, written last, and the folder's name. Raises DataError when shards are missing."""
    folder = folder.absolute()
    place, tasks = partial_folder(folder), plan.tasks()
    names = set(os.listdir(place))
    missing = [task.shard for task in tasks if not names.issuperset((task.shard, index_name(task.shard)))]
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(tasks)} shards are missing ({missing[0]} is the first); run the tasks "
            "again, they write only these"
        )
    origin = {"format": plan.dataset.reading.format, "plan": plan.fingerprint}
    manifest = Manifest(folder.name, [_row(place, task.shard) for task in tasks], origin)
    if not manifest.num_samples:
        reasons = count_rejected(place, [task.shard for task in tasks])
        raise DataError(f"{place}: no row can be used; the most frequent reason: {next(iter(reasons), 'none')}")
    with must_write(folder, _WAY_OUT):
        for name in names:
            if name == ".lock" or (name.startswith(".") and name.endswith(".tmp")):
                (place / name).unlink(missing_ok=True)
        manifest.save(place)
        if folder.exists():
            folder.rmdir()
        place.rename(folder)
    return Written(manifest, count_rejected(folder, [task.shard for task in tasks]))


def count_rejected(folder: Path, shards: list[str]) -> dict[str, int]:
    """How many rows were rejected for which reasons, most frequent first."""
    names = set(os.listdir(folder))
    reasons: Counter[str] = Counter()
    for name in map(rejected_name, shards):
        if name in names:
            reasons.update(str(row.get("error")) for row in read_json_lines(folder / name))
    return dict(reasons.most_common())


def _members(record: dict[str, Any] | Rejected) -> dict[str, Any] | Rejected:
    if isinstance(record, Rejected):
        return record
    try:
        return to_members(record)
    except SampleError as error:
        return Rejected(record["key"], str(error))


def _row(folder: Path, shard: str) -> ShardInfo:
    """A shard's line of the manifest, from its index. Raises DataError when the two do not fit."""
    data = (folder / index_name(shard)).read_bytes()
    size = (folder / shard).stat().st_size if (folder / shard).is_file() else -1
    digest = index_digest(data)
    header = json.loads(data.partition(b"\n")[0]) if digest else {}
    if header.get("size") != size:
        raise DataError(f"{folder / shard} does not fit its index; delete {folder / index_name(shard)}, run it again")
    return ShardInfo(shard, header["samples"], size, digest)


def _already(dataset: Dataset, folder: Path, samples_per_shard: int) -> Written:
    """What an earlier call has written. Raises DataError when it wrote something else."""
    plan = load_plan(folder, dataset)
    plan.check(dataset, samples_per_shard, folder)
    return Written(
        load_manifest(LocalStorage(str(folder))), count_rejected(folder, [task.shard for task in plan.tasks()])
    )

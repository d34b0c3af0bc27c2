"""Writes a published dataset as shards: one task per shard, in any order, by any number of processes and machines.

The shards of a folder count when the last of them is there, and its manifest (target.py). A shard is done when its
index lies beside it: a task that was killed leaves nothing that counts.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import must_write, open_atomic, read_new_lines, write_atomic, write_json_lines
from data_pipeline.importers.records import Dataset, Reading, Rejected
from data_pipeline.preparation.engines import Engine, Local, run, share
from data_pipeline.preparation.target import PLAN, WAY_OUT, Target, open_target, rejected_name
from data_pipeline.preparation.work_plan import Task, WorkPlan, content_of, load_plan, make_plan, shared_plan
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import scan_shard
from data_pipeline.shards.manifest import Manifest, ShardTable, load_manifest
from data_pipeline.shards.sidecars import index_name
from data_pipeline.shards.storage import LocalStorage
from data_pipeline.shards.writer import tar_writers, to_members
from data_pipeline.stores.object_storage import ObjectStorage

__all__ = ["finish", "is_written", "make_plan", "plan_folder", "write_dataset", "write_missing"]
Folder = str | os.PathLike[str]
"""Path or URL."""


@dataclass(frozen=True)
class Written:
    """What was written: the manifest, and how many rows were rejected for which reasons, most frequent first."""

    manifest: Manifest
    rejected: dict[str, int] = field(default_factory=dict)


def write_dataset(
    dataset: Dataset,
    folder: Folder,
    *,
    samples_per_shard: int = 1000,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Written:
    """Write what is missing, and finish. Raises DataError when a file cannot be read; what is done stays done."""
    target = open_target(folder)
    if target.is_finished():
        return _already(dataset, target, samples_per_shard)
    plan = plan_folder(dataset, folder, samples_per_shard, progress=progress)
    write_missing(plan, folder, engine=engine, progress=progress)
    return finish(plan, folder, engine=engine, progress=progress)


def is_written(folder: Folder) -> bool:
    """Whether an earlier call has finished the folder."""
    return open_target(folder).is_finished()


def plan_folder(
    dataset: Dataset,
    folder: Folder,
    samples_per_shard: int,
    *,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> WorkPlan:
    """The plan of a folder's shards, made when it is not there. Raises DataError when the folder is not empty."""
    target = open_target(folder)
    return shared_plan(target, dataset, samples_per_shard, num_processes=num_processes, progress=progress)


def write_missing(
    plan: WorkPlan,
    folder: Folder,
    *,
    task: int = 0,
    tasks: int = 1,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> int:
    """Write the shards of part `task` of `tasks` that are not there; returns how many. Raises DataError."""
    target = open_target(folder)
    mine = share(plan.tasks(), task, tasks)
    names = target.names()
    missing = [each for each in mine if not names.issuperset((each.shard, index_name(each.shard)))]
    there = f" ({len(mine) - len(missing)} shards are there)" if len(missing) < len(mine) else ""
    title, engine = f"write {target.name}{there}", engine or Local()
    if isinstance(engine, Local) and isinstance(target.storage, ObjectStorage):
        engine = replace(engine, per_core=2)  # one makes a shard while that of the other is uploaded
    run(partial(write_shard, target, plan.dataset.reading), missing, engine, title=title, progress=progress)
    return len(missing)


def write_shard(target: Target, reading: Reading, task: Task) -> None:
    """One shard with its index, which is written last, and its rejected rows. Raises DataError."""
    if content_of(task.file) != task.input.content:
        raise DataError(f"{task.file} has changed since {PLAN} was made; delete {target} and write it again")
    with target.room(task.shard) as folder:
        path, rejected, written = folder / task.shard, [], 0
        with (
            must_write(path, WAY_OUT),
            open_atomic(path) as file,
            tar_writers().TarWriter(file, mtime=0, format="PAX_FORMAT", compress=False) as writer,
        ):
            for record in reading.records(task.file, task.input.prefix, task.begin, task.end, task.offset):
                sample = _members(record)
                if isinstance(sample, Rejected):
                    rejected.append({"key": sample.key, "file": task.input.name, "error": sample.error})
                else:
                    writer.write(sample)
                    written += 1
            if written + len(rejected) != task.end - task.begin:
                rows = f"{written + len(rejected)} rows, not the {task.end - task.begin} of {PLAN}"
                raise DataError(f"{task.file}: {rows}")
        with must_write(path, WAY_OUT):
            if rejected:
                write_json_lines(folder / rejected_name(task.shard), rejected)
            else:
                (folder / rejected_name(task.shard)).unlink(missing_ok=True)
            write_atomic(folder / index_name(task.shard), scan_shard(LocalStorage(str(folder)), task.shard))


def finish(plan: WorkPlan, folder: Folder, *, engine: Engine | None = None, progress: Progress = silent) -> Written:
    """The manifest of all shards, written last. Raises DataError when shards are missing."""
    target = open_target(folder)
    shards, names = [task.shard for task in plan.tasks()], target.names()
    missing = [shard for shard in shards if not names.issuperset((shard, index_name(shard)))]
    if missing:
        raise DataError(
            f"{target}: {len(missing)} of {len(shards)} shards are missing ({missing[0]} is the first); run the tasks "
            "again, they write only these"
        )
    rows = target.rows(shards, engine or Local(), progress)
    origin = {"format": plan.dataset.reading.format, "plan": plan.fingerprint}
    etags = {row.name: etag for row, etag in rows if etag}
    manifest = Manifest(target.name, ShardTable(row for row, _ in rows), origin, etags)
    rejected = _rejected(target, shards)
    if not manifest.num_samples:
        raise DataError(f"{target}: no row can be used; the most frequent reason: {next(iter(rejected), 'none')}")
    target.finish(manifest)
    return Written(manifest, rejected)


def _rejected(target: Target, shards: Sequence[str]) -> dict[str, int]:
    """How many rows were rejected for which reasons, most frequent first."""
    names = target.names()
    reasons: Counter[str] = Counter()
    for name in map(rejected_name, shards):
        if name in names:
            reasons.update(str(row.get("error")) for row in read_new_lines(io.BytesIO(target.read(name)))[0])
    return dict(reasons.most_common())


def _members(record: dict[str, Any] | Rejected) -> dict[str, Any] | Rejected:
    if isinstance(record, Rejected):
        return record
    try:
        return to_members(record)
    except SampleError as error:
        return Rejected(record["key"], str(error))


def _already(dataset: Dataset, target: Target, samples_per_shard: int) -> Written:
    """What an earlier call has written. Raises DataError when it wrote something else."""
    plan = load_plan(target, dataset)
    plan.check(dataset, samples_per_shard, target)
    return Written(load_manifest(target.storage), _rejected(target, [task.shard for task in plan.tasks()]))

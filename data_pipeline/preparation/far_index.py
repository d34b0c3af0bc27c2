"""Indexes a folder of shards in an object store by tasks of one or many machines, and measures its samples at the end.

A task reads its shards and publishes their indexes beside them; `finish` writes the manifest and the sample lengths,
for which it reads texts only. Where the folder cannot be written, indexes stay in the cache: all machines need one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.preparation.engines import Engine, Local, run, share
from data_pipeline.preparation.index import Measuring, refuse_missing
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import Seen, fetch_indexes, index_object, index_shards, is_done, look
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sidecars import writable_place
from data_pipeline.shards.sources import measure_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores.object_storage import ObjectStorage


@dataclass(frozen=True)
class FarJob:
    """A folder of shards in an object store, its cache on this node, and the ways to measure its samples."""

    storage: ObjectStorage
    place: Path
    shards: Sequence[Seen]
    measurings: Sequence[Measuring]


def is_far(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder of shards lies in an object store."""
    return isinstance(open_storage(folder), ObjectStorage)


def open_job(folder: str | os.PathLike[str], measurings: Sequence[Measuring] = ()) -> FarJob:
    """The shards of a folder. Raises DataError when there are none."""
    storage = open_storage(folder)
    assert isinstance(storage, ObjectStorage)
    shards = look(storage)
    if not shards:
        raise DataError(f"{storage}: no .tar shards here")
    return FarJob(storage, writable_place(storage), shards, measurings)


def index_missing(
    job: FarJob, *, task: int = 0, tasks: int = 1, engine: Engine | None = None, progress: Progress = silent
) -> int:
    """Index part `task` of `tasks` of the shards; returns how many were not done. Raises DataError."""
    mine = share(job.shards, task, tasks)
    title = f"index {job.storage.url.rsplit('/', 1)[-1]}"
    work = partial(_index, job.storage, job.place)
    fetch_indexes(job.storage, job.place, mine)
    return sum(run(work, mine, engine or Local(), title=title, progress=progress))


def finish(job: FarJob, *, num_processes: int | None = None, progress: Progress = silent) -> Manifest:
    """The manifest, and the lengths of all samples. Raises DataError when any shard is not done."""
    shards = look(job.storage)  # what other machines have done since the job was opened
    fetch_indexes(job.storage, job.place, shards)
    missing = partial(_missing, job.storage, job.place)
    looked = run(missing, shards, Local(num_processes), title="look at the indexes", progress=progress)
    refuse_missing(job.storage, sorted(name for name in looked if name), len(shards))
    manifest = index_shards(job.storage.url, num_processes=num_processes, progress=progress)
    for each in job.measurings:
        measure_source(job.storage.url, each.encoder, each.prompt, num_processes=num_processes, progress=progress)
    return manifest


def _index(storage: ObjectStorage, place: Path, seen: Seen) -> bool:
    fetch_indexes(storage, place, [seen])  # on another machine of Ray's
    if is_done(storage, place, seen):
        return False
    index_object(storage, place, seen)
    return True


def _missing(storage: ObjectStorage, place: Path, seen: Seen) -> str:
    """The name of a shard that is not done; empty when it is."""
    return "" if is_done(storage, place, seen) else seen.name

"""Indexes a folder of shards in an object store by tasks of one or many machines, and measures its samples at the end.

A task reads its shards once, and publishes their indexes and sample lengths beside them; `finish` joins the lengths,
deletes their files and writes the manifest. Where shards were indexed without being measured, it reads their texts.
Where the folder cannot be written, indexes stay in the cache: all machines need one.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.preparation.engines import Engine, Local, run, share
from data_pipeline.preparation.index import (
    Measuring,
    digest_in,
    joined,
    lengths_name,
    lengths_suffix,
    refuse_missing,
    scan_and_measure,
)
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import Seen, fetch_indexes, index_object, index_shards, is_done, look
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sidecars import writable_place
from data_pipeline.shards.sources import is_measured, keep_measures, measure_source
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.stores.failures import AccessError
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
    work = partial(_index, job.storage, job.place, job.measurings)
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
        reader = SourceReader(job.storage.url, prompt=each.prompt)
        left = job.storage.listed(lengths_suffix(each))
        if not is_measured(reader, each.encoder):
            _measure(job.storage, reader, each, left, num_processes, progress)
        with suppress(DataError):  # who may write may not always delete
            job.storage.delete(*left)  # also after a call that was killed when it had joined them
    return manifest


def _measure(
    storage: ObjectStorage,
    reader: SourceReader,
    measuring: Measuring,
    left: Container[str],
    num_processes: int | None,
    progress: Progress,
) -> None:
    """Join the lengths that the tasks have left; where some are missing, measure all samples by their texts."""
    shards = reader.manifest.shards
    names = [lengths_name(shard.name, measuring) for shard in shards]
    parts = list(storage.reads(names)) if all(name in left for name in names) else []
    if parts and all(
        digest_in(part.partition(b"\n")[0]) == shard.sha256 for part, shard in zip(parts, shards, strict=True)
    ):
        keep_measures(reader, measuring.encoder, *joined(reader, parts))
    else:
        url, prompt = storage.url, measuring.prompt
        measure_source(url, measuring.encoder, prompt, num_processes=num_processes, progress=progress)


def _index(storage: ObjectStorage, place: Path, measurings: Sequence[Measuring], seen: Seen) -> bool:
    fetch_indexes(storage, place, [seen])  # on another machine of Ray's
    if is_done(storage, place, seen):
        return False
    index_object(storage, place, seen, partial(_scan, measurings))
    return True


def _scan(measurings: Sequence[Measuring], storage: Storage, name: str) -> bytes:
    """The index of a shard, whose samples' lengths go beside it first."""
    assert isinstance(storage, ObjectStorage)
    index, lengths = scan_and_measure(storage, measurings, name)
    with suppress(AccessError):  # a folder that cannot be written: `finish` reads the texts
        for each, lines in zip(measurings, lengths, strict=True):
            storage.write(lengths_name(name, each), lines.encode())
    return index


def _missing(storage: ObjectStorage, place: Path, seen: Seen) -> str:
    """The name of a shard that is not done; empty when it is."""
    return "" if is_done(storage, place, seen) else seen.name

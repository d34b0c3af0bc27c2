"""Indexes a folder of shards, and measures its samples in the same pass: one task per shard, on any number of machines.

A task reads its shard once, and writes the sample lengths beside the index, which comes last. `finish` joins them and
writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import must_write, write_atomic
from data_pipeline.masking import mask
from data_pipeline.preparation.engines import Engine, Local, run, share
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import Encoder, SampleError
from data_pipeline.shards.index import fitting_index, index_bytes, index_digest, index_shards, no_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import TEXT_MEMBERS, SourceReader, text_record, too_large
from data_pipeline.shards.sidecars import index_name, is_indexed, writable_place
from data_pipeline.shards.sources import is_measured, keep_measures, measure_messages
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.shards.tarscan import ScannedSample, scan_tar

_WAY_OUT = "make room or the folder writable"
_TEXT_BYTES = 2 * 1024**2
"""Texts that are held before they are measured together: hashing a picture takes the code that measures out of the
core's cache."""


@dataclass(frozen=True)
class Measuring:
    """How samples are measured: an encoder, and the prompt of captions."""

    encoder: Encoder
    prompt: str = ""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.encoder.fingerprint}\n{self.prompt}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A local folder of shards, where its indexes go, and the ways to measure its samples."""

    storage: Storage
    place: Path
    names: list[str]
    measurings: Sequence[Measuring]
    measured: Sequence[Measuring] = ()
    """What an earlier call has finished with."""


def open_job(folder: str | os.PathLike[str], measurings: Sequence[Measuring] = ()) -> Job:
    """The shards of a local or shared folder; far_index.py has those of object stores. Raises DataError for none."""
    storage = open_storage(folder)
    names = list(storage.list(".tar"))
    if not names:
        raise no_shards(storage)
    measured = [each for each in measurings if _is_measured(storage, names, each)]
    left = [each for each in measurings if each not in measured]
    return Job(storage, writable_place(storage), names, left, measured)


def _is_measured(storage: Storage, names: list[str], measuring: Measuring) -> bool:
    """Whether an earlier call has finished with these shards."""
    if not is_indexed(storage):
        return False
    reader = SourceReader(storage.url, prompt=measuring.prompt)
    listed = [(shard.name, shard.size) for shard in reader.manifest.shards]
    return listed == [(name, storage.size(name)) for name in names] and is_measured(reader, measuring.encoder)


def index_missing(
    job: Job, *, task: int = 0, tasks: int = 1, engine: Engine | None = None, progress: Progress = silent
) -> int:
    """Index and measure part `task` of `tasks` of the shards; returns how many were not done. Raises DataError."""
    mine = share(job.names, task, tasks)
    title = f"index {Path(job.storage.url).name}"
    work = partial(index_shard, job.storage, job.place, job.measurings)
    return sum(run(work, mine, engine or Local(), title=title, progress=progress))


def index_shard(storage: Storage, place: Path, measurings: Sequence[Measuring], name: str) -> bool:
    """One shard, unless it is done; returns whether it was not. Raises DataError for damaged shards."""
    if is_done(storage, place, measurings, name):
        return False
    index, lengths = scan_and_measure(storage, measurings, name)
    target = place / index_name(name)
    with must_write(target, _WAY_OUT):
        target.parent.mkdir(parents=True, exist_ok=True)
        for each, lines in zip(measurings, lengths, strict=True):
            write_atomic(place / lengths_name(name, each), lines)
        write_atomic(target, index)
    return True


def scan_and_measure(storage: Storage, measurings: Sequence[Measuring], name: str) -> tuple[bytes, list[str]]:
    """The index of a shard, and for each way to measure its samples a file with their lengths, by one pass over it."""
    path, size = storage.local_path(name) or f"{mask(storage.url)}/{name}", storage.size(name)
    lengths: list[list[str]] = [[] for _ in measurings]
    scanned, num_measured, held = [], 0, 0
    with storage.open(name) as file:
        for sample in scan_tar(file, size, str(path), TEXT_MEMBERS if measurings else ()):
            scanned.append(sample)
            held += sum(map(len, sample.texts.values()))
            if held > _TEXT_BYTES:
                _measure_all(measurings, scanned[num_measured:], lengths)
                num_measured, held = len(scanned), 0
    _measure_all(measurings, scanned[num_measured:], lengths)
    index = index_bytes(scanned, name.rsplit("/", 1)[-1], size)
    first = json.dumps({"index": index_digest(index)})
    return index, ["\n".join([first, *lines, ""]) for lines in lengths]


def is_done(storage: Storage, place: Path, measurings: Sequence[Measuring], name: str) -> bool:
    """Whether a shard's index fits it, and its samples' lengths fit the index."""
    found = fitting_index(storage, name, place)
    return found is not None and all(
        _digest_of(place / lengths_name(name, each)) == found.sha256 for each in measurings
    )


def finish(job: Job, *, num_processes: int | None = None, progress: Progress = silent) -> Manifest:
    """The manifest, and the lengths of all samples in one file. Raises DataError when any shard is not done."""
    missing = [name for name in job.names if not is_done(job.storage, job.place, job.measurings, name)]
    refuse_missing(job.storage, missing, len(job.names))
    manifest = index_shards(job.storage.url, num_processes=num_processes, progress=progress)
    for each in job.measurings:
        reader = SourceReader(job.storage.url, prompt=each.prompt)
        parts = ((job.place / lengths_name(shard.name, each)).read_bytes() for shard in manifest.shards)
        keep_measures(reader, each.encoder, *joined(reader, parts))
    _remove_leftovers(job)
    return manifest


def joined(reader: SourceReader, parts: Iterable[bytes]) -> tuple[np.ndarray, list[dict[str, str]]]:
    """What `keep_measures` takes, from the files of all shards' lengths, in their order."""
    measures, bad = np.zeros((len(reader), 2), dtype=np.uint32), []
    for start, shard, part in zip(reader.shard_starts, reader.manifest.shards, parts, strict=False):
        for number, row in enumerate(part.splitlines()[1:], int(start)):
            found = json.loads(row)
            if isinstance(found, dict):
                bad.append({"shard": shard.name, **found})
            else:
                measures[number] = found
    return measures, bad


def refuse_missing(storage: Storage, missing: Sequence[str], total: int) -> None:
    """Raise DataError when any of a folder's shards is not done."""
    if missing:
        raise DataError(
            f"{mask(storage.url)}: {len(missing)} of {total} shards are not done ({missing[0]} is the first); "
            "run the tasks again, they do only these"
        )


def _remove_leftovers(job: Job) -> None:
    """Lengths that are joined, also by a call that was killed then, and what was being written when a task was."""
    ends = tuple(map(lengths_suffix, (*job.measurings, *job.measured)))
    halves = re.compile(r"\..+\.(?:index|lengths-[0-9a-f]{16})\.jsonl\.[0-9a-f]{32}\.tmp\Z")
    for folder in {(job.place / name).parent for name in job.names}:
        for file in os.listdir(folder):
            if file.endswith(ends) or halves.match(file):
                (folder / file).unlink(missing_ok=True)


def _measure_all(measurings: Sequence[Measuring], samples: list[ScannedSample], lengths: list[list[str]]) -> None:
    """Add the samples' lines to the lengths of each way to measure them, and drop their texts."""
    for measuring, lines in zip(measurings, lengths, strict=True):
        lines += [_measure(measuring, sample) for sample in samples]
    for sample in samples:
        sample.texts.clear()


def _measure(measuring: Measuring, sample: ScannedSample) -> str:
    """The line of a sample: [tokens, tiles], or {"key", "error"} of one that cannot be used."""
    try:
        if error := too_large({name: sample.members[name] for name in TEXT_MEMBERS if name in sample.members}):
            raise SampleError(error)
        messages, sizes, _ = text_record(sample.texts, sample.image_sizes, measuring.prompt)
        tokens, tiles = measure_messages(measuring.encoder, messages, sizes)
        return f"[{tokens}, {tiles}]"
    except SampleError as error:
        return json.dumps({"key": sample.key, "error": str(error)})


def lengths_name(shard: str, measuring: Measuring) -> str:
    """Name of the file with the lengths of a shard's samples."""
    return f"{shard.removesuffix('.tar')}{lengths_suffix(measuring)}"


def lengths_suffix(measuring: Measuring) -> str:
    """How the names of such files end."""
    return f".lengths-{measuring.fingerprint}.jsonl"


def _digest_of(part: Path) -> str:
    """The digest of the index that a file of lengths belongs to; "" where there is none."""
    try:
        with part.open("rb") as file:
            return digest_in(file.readline())
    except OSError:
        return ""


def digest_in(first: bytes) -> str:
    """The same from its first line; "" of one that is damaged."""
    try:
        return str(json.loads(first)["index"])
    except (ValueError, KeyError, TypeError):
        return ""

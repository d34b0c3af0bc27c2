"""Reads every byte of a folder of shards again: what no longer matches its index, and what training would leave out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.errors import DataError, UnreachableError
from data_pipeline.parallel import pool, usable_cores
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import Encoder, Sample, SampleError, encode_as_measured
from data_pipeline.shards.index import index_digest, scan_shard
from data_pipeline.shards.manifest import ShardInfo, load_manifest
from data_pipeline.shards.reader import Record, SourceReader
from data_pipeline.shards.sidecars import index_name, index_storage
from data_pipeline.shards.sources import measure_messages
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.stores.failures import AccessError, MissingObjectError, NoRangesError
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.remote import ObjectInfo, names_content


@dataclass(frozen=True)
class Reading:
    """How samples are read: the prompt of captions, and an encoder; without one they are only decoded."""

    prompt: str = ""
    encoder: Encoder | None = None


def verify_folder(
    folder: str | os.PathLike[str],
    *,
    decode: bool = False,
    readings: Sequence[Reading] = (),
    num_processes: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Problems of a folder, one line each; empty when every shard is as it was indexed.

    Args:
        decode: also decode every sample, as the loader would.
        readings: also measure and encode every sample in these ways, as training would.

    Raises:
        DataError: no manifest, or a store that does not answer.
    """
    storage = open_storage(folder)
    manifest, place = load_manifest(storage), index_storage(storage)
    shards = manifest.shards
    known = {shard.name for shard in shards}
    there = storage.listed(".tar") if isinstance(storage, ObjectStorage) else storage.list(".tar")
    problems = [f"{name}: not in the manifest" for name in there if name not in known]
    with pool(num_processes, len(shards)) as executor, progress("verify", len(shards)) as advance:
        run = map if executor is None else executor.map
        etags = (manifest.etags.get(shard.name, "") for shard in shards)
        for lines in run(_verify_shard, [storage] * len(shards), [place] * len(shards), shards, etags):
            problems += lines
            advance(1)
    unusable: dict[tuple[str, str], str] = {}
    for reading in readings or ([Reading()] if decode else []):
        reader = SourceReader(folder, prompt=reading.prompt)
        for shard, key, error in _unusable_samples(reader, reading.encoder, num_processes, progress):
            unusable.setdefault((shard, key), error)
    said = {f"{shard}: sample {key}: content changed" for shard, key in unusable}
    return [
        *(line for line in problems if line not in said),
        *(f"{shard}: sample {key}: {error}" for (shard, key), error in unusable.items()),
    ]


def _unusable_samples(
    reader: SourceReader, encoder: Encoder | None, num_processes: int | None, progress: Progress
) -> Iterator[tuple[str, str, str]]:
    """(shard, key, reason) of every sample that training would leave out."""
    count = len(reader.manifest.shards)
    chunk = max(1, count // (usable_cores() * 8))
    ranges = [(begin, min(begin + chunk, count)) for begin in range(0, count, chunk)]
    what = "decode" if encoder is None else "encode"
    with pool(num_processes, len(ranges)) as executor, progress(what, len(reader)) as advance:
        run = map if executor is None else executor.map
        tasks = run(_unusable_in, [reader] * len(ranges), [encoder] * len(ranges), ranges)
        for (begin, end), found in zip(ranges, tasks, strict=True):
            yield from found
            advance(int(reader.shard_starts[end] - reader.shard_starts[begin]))


def _unusable_in(reader: SourceReader, encoder: Encoder | None, shards: tuple[int, int]) -> list[tuple[str, str, str]]:
    """The same of the shards from one number to another. What is wrong with a whole shard was said before."""
    found = []
    for shard in range(*shards):
        info = reader.manifest.shards[shard]
        try:
            if not reader.storage.exists(info.name):
                continue
            numbers = range(int(reader.shard_starts[shard]), int(reader.shard_starts[shard + 1]))
            for number, error in zip(numbers, _why_unusable(reader, encoder, numbers), strict=True):
                if error:
                    found.append((info.name, reader.entry(number).key, error))
        except UnreachableError:
            raise
        except DataError:
            continue  # cut, not to be read, or its index is another one
    return found


def _why_unusable(reader: SourceReader, encoder: Encoder | None, numbers: Sequence[int]) -> Iterator[str]:
    """Why measuring or the loader would leave out each of these samples; empty where neither would."""
    if encoder is None:
        yield from (str(each) if isinstance(each, SampleError) else "" for each in reader.samples(numbers))
        return
    for record, sample in zip(reader.records(numbers), reader.samples(numbers), strict=True):
        yield _why_not_encoded(encoder, record, sample)


def _why_not_encoded(encoder: Encoder, record: Record | SampleError, sample: Sample | SampleError) -> str:
    try:
        if isinstance(record, SampleError):
            raise record
        tokens, tiles = measure_messages(encoder, *record[:2])
        if isinstance(sample, SampleError):
            raise sample
        encode_as_measured(encoder, sample, tokens, tiles)
    except SampleError as error:
        return str(error)
    return ""


def _verify_shard(storage: Storage, place: Storage, shard: ShardInfo, etag: str) -> list[str]:
    name, now = index_name(shard.name), ObjectInfo(shard.size, etag)
    try:
        if isinstance(storage, ObjectStorage):
            now = storage.head(shard.name)
        elif not storage.exists(shard.name):
            return [f"{shard.name}: missing"]
    except MissingObjectError:
        return [f"{shard.name}: missing"]
    except AccessError as error:  # perhaps to this one only
        return [f"{shard.name}: cannot be read: {error}"]
    if not place.exists(name):
        return [f"{name}: missing"]
    written = place.read(name)
    if index_digest(written) != shard.sha256:
        return [f"{name}: does not match the manifest; index again"]
    try:
        found = scan_shard(storage, shard.name)
    except UnreachableError:
        raise  # says nothing of the shard
    except NoRangesError:
        if now.size == shard.size:
            raise  # nor does this
        return [f"{shard.name}: {now.size:,} bytes, {shard.size:,} when it was indexed"]
    except DataError as error:
        return [f"{shard.name}: damaged: {error}"]
    if index_digest(found) != shard.sha256:
        return _differences(shard.name, written, found)
    if names_content(etag) and now.etag != etag:  # as when it was copied or uploaded again
        return [f"{shard.name}: what was indexed, with another ETag ({etag}; now {now.etag or 'none'}); index again"]
    return []


def _differences(shard: str, written: bytes, found: bytes) -> list[str]:
    """Which samples differ between two indexes."""
    old, new = ({json.loads(line)["key"]: line for line in data.splitlines()[1:]} for data in (written, found))
    lines = [f"{shard}: sample {key}: missing" for key in old if key not in new]
    lines += [f"{shard}: sample {key}: not in the index" for key in new if key not in old]
    lines += [f"{shard}: sample {key}: content changed" for key in old if key in new and old[key] != new[key]]
    return lines or [f"{shard}: size or padding changed"]

"""Reads every byte of a folder of shards again and lists what no longer matches its index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from data_pipeline.errors import DataError
from data_pipeline.parallel import pool
from data_pipeline.progress import Progress, silent
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import ShardInfo, index_digest, load_manifest, scan_shard
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sidecars import index_name, index_storage
from data_pipeline.shards.storage import open_storage


def verify_folder(
    folder: str | os.PathLike[str],
    *,
    decode: bool = False,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Problems of a folder, one line each; empty when every shard is as it was indexed.

    Args:
        decode: also decode every sample, as the loader would.

    Raises:
        DataError: no manifest.
    """
    storage = open_storage(folder)
    shards = load_manifest(storage).shards
    known = {shard.name for shard in shards}
    problems = [f"{name}: not in the manifest" for name in storage.list(".tar") if name not in known]
    with pool(num_processes, len(shards)) as executor, progress("verify", len(shards)) as advance:
        run = map if executor is None else executor.map
        for lines in run(_verify_shard, [os.fspath(folder)] * len(shards), shards):
            problems += lines
            advance(1)
    if decode and not problems:
        reader = SourceReader(folder)
        with progress("decode", len(reader)) as advance:
            for number in range(len(reader)):
                problems += _undecodable(reader, number)
                advance(1)
    return problems


def _undecodable(reader: SourceReader, number: int) -> Iterator[str]:
    try:
        reader[number]
    except SampleError as error:
        entry = reader.entry(number)
        yield f"{entry.shard}: sample {entry.key}: {error}"


def _verify_shard(folder: str, shard: ShardInfo) -> list[str]:
    storage = open_storage(folder)
    place, name = index_storage(storage), index_name(shard.name)
    if not storage.exists(shard.name):
        return [f"{shard.name}: missing"]
    if not place.exists(name):
        return [f"{name}: missing"]
    written = place.read(name)
    if index_digest(written) != shard.sha256:
        return [f"{name}: does not match the manifest; index again"]
    try:
        found = scan_shard(storage, shard.name)
    except DataError as error:
        return [f"{shard.name}: damaged: {error}"]
    return [] if index_digest(found) == shard.sha256 else _differences(shard.name, written, found)


def _differences(shard: str, written: bytes, found: bytes) -> list[str]:
    """Which samples differ between two indexes."""
    old, new = ({json.loads(line)["key"]: line for line in data.splitlines()[1:]} for data in (written, found))
    lines = [f"{shard}: sample {key}: missing" for key in old if key not in new]
    lines += [f"{shard}: sample {key}: not in the index" for key in new if key not in old]
    lines += [f"{shard}: sample {key}: content changed" for key in old if key in new and old[key] != new[key]]
    return lines or [f"{shard}: size or padding changed"]

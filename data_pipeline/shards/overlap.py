"""Whether two folders of shards share one: by content, whatever the folders and the shards are called."""

from __future__ import annotations

import json
import os
from collections import defaultdict

from data_pipeline.shards.index import ShardInfo, load_manifest
from data_pipeline.shards.sidecars import index_name, index_storage, is_indexed
from data_pipeline.shards.storage import Storage, open_storage


def common_shard(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Names of two shards, one of each folder, with the same samples; None where there are none, or no index.

    Reads the indexes of shards of equal size only. Raises DataError for a damaged manifest.
    """
    folders = open_storage(left), open_storage(right)
    if not all(is_indexed(folder) for folder in folders):
        return None
    alike: dict[tuple[int, int], list[ShardInfo]] = defaultdict(list)
    for shard in load_manifest(folders[1]).shards:
        alike[shard.samples, shard.size].append(shard)
    for shard in load_manifest(folders[0]).shards:
        for other in alike.get((shard.samples, shard.size), ()):
            digest = content_digest(folders[0], shard.name)
            if digest is not None and digest == content_digest(folders[1], other.name):
                return shard.name, other.name
    return None


def content_digest(folder: Storage, shard: str) -> str | None:
    """sha256 of a shard's samples, from the first line of its index; None where the index cannot be read."""
    place, name = index_storage(folder), index_name(shard)
    if not place.exists(name):
        return None
    try:
        return str(json.loads(place.read(name).partition(b"\n")[0])["sha256"])
    except (KeyError, TypeError, ValueError):
        return None

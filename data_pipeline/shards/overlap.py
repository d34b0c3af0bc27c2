"""Whether two folders of shards share one: by content, whatever the folders and the shards are called."""

from __future__ import annotations

import json
import os
from collections import defaultdict

from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.sidecars import index_name, index_storage
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.stores.folders import MANIFEST


def common_shard(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Names of two shards, one of each folder, with the same samples; None where there are none, or no index.

    Reads the indexes of shards of equal size only, each once. Raises DataError for a damaged manifest.
    """
    folders = open_storage(left), open_storage(right)
    places = [index_storage(folder) for folder in folders]
    if not all(place.exists(MANIFEST) for place in places):
        return None
    shards, others = (load_manifest(folder).shards for folder in folders)
    alike: dict[tuple[int, int], list[str]] = defaultdict(list)
    for other in others:
        if other.samples:
            alike[other.samples, other.size].append(other.name)
    digests: dict[tuple[int, int], dict[str | None, str]] = {}
    for shard in shards:
        key = shard.samples, shard.size
        if key not in alike:
            continue
        if key not in digests:
            digests[key] = {content_digest(places[1], name): name for name in alike[key]}
        digest = content_digest(places[0], shard.name)
        if digest is not None and digest in digests[key]:
            return shard.name, digests[key][digest]
    return None


def content_digest(place: Storage, shard: str) -> str | None:
    """sha256 of a shard's samples, from the first line of its index; None where the index cannot be read."""
    name = index_name(shard)
    if not place.exists(name):
        return None
    try:
        with place.open(name) as file:
            return str(json.loads(file.readline())["sha256"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None

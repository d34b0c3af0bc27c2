"""The manifest of a folder of shards: what it holds, in which order, and a fingerprint of the content.

`manifest.json` lists the shards in the order that sample numbers follow; index.py writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, LoadError
from data_pipeline.files import check_name, has_shape, reason, write_atomic
from data_pipeline.masking import mask
from data_pipeline.shards.sidecars import MANIFEST, index_storage, searched
from data_pipeline.shards.storage import Storage
from data_pipeline.stores.node_cache import ETAGS, CachedFolder

MANIFEST_VERSION = 1


def _is_row(row: Any) -> bool:
    """Whether JSON data is a shard's row of a manifest."""
    return isinstance(row, list) and len(row) == 4 and all(map(has_shape, row, (str, int, int, str))) and row[1] >= 0


_MANIFEST_SHAPE = {"source": str, "fingerprint": str, "origin?": dict, "shards": [_is_row]}

_ETAGS_SHAPE = {"url": str, "manifest": str, "etags": {str: str}}


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One line of the manifest; `sha256` is the digest of the shard's index: keys, places, checksums and content."""

    name: str
    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder of shards. Sample i is the i-th in the order of the shards."""

    source: str
    shards: list[ShardInfo]
    origin: dict[str, Any] = field(default_factory=dict)
    """How the shards came to be, e.g. generator and arguments; compared before they are used again."""
    etags: Mapping[str, str] = field(default_factory=dict)
    """ETags of the shards in the object store where they were indexed; not part of the content."""

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all shards' content, in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name}\n{shard.samples}\n{shard.size}\n{shard.sha256}\n".encode())
        return digest.hexdigest()

    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first sample of each shard, and the total."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)]).astype(
            np.int64
        )

    def save(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        rows = [[shard.name, shard.samples, shard.size, shard.sha256] for shard in self.shards]
        content = {
            "version": MANIFEST_VERSION,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": self.num_samples,
            "bytes": sum(shard.size for shard in self.shards),
            "origin": self.origin,
            "columns": ["name", "samples", "size", "sha256"],
        }
        head = json.dumps(content, indent=1)[:-2]
        body = ",\n  ".join(json.dumps(row) for row in rows)
        return f'{head},\n "shards": [\n  {body}\n ]\n}}\n'.encode(errors="backslashreplace")


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of a folder. Raises DataError when it is missing, damaged, or of another version."""
    place = index_storage(storage)
    path = f"{place.url}/{MANIFEST}"
    if not place.exists(MANIFEST):
        raise LoadError(
            f"{storage.url}: no {MANIFEST}{searched(storage)}; "
            f"run `alignvlm data index {storage.url}` on a folder of tar shards"
        )
    try:
        content = json.loads(place.read(MANIFEST).decode())  # of 100,000 shards 12 MB, not twice in memory
        if has_shape(content, {"version": int}) and content["version"] != MANIFEST_VERSION:
            raise DataError(f"{path} has version {content['version']}, this code reads {MANIFEST_VERSION}; index again")
        if not has_shape(content, _MANIFEST_SHAPE):
            raise ValueError("it does not hold what it should")
        shards = [ShardInfo(check_name(name), samples, size, sha) for name, samples, size, sha in content.pop("shards")]
        found = _etags(place, content["fingerprint"])
        etags = {shard.name: found[shard.name] for shard in shards if shard.name in found}
        manifest = Manifest(content["source"], shards, content.get("origin") or {}, etags)
        is_whole = manifest.fingerprint == content["fingerprint"]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); run `alignvlm data index {storage.url}`") from error
    if not is_whole:
        raise DataError(f"{path} was edited: its fingerprint does not match its shards; index the folder again")
    return manifest


def _etags(place: Storage, fingerprint: str) -> dict[str, str]:
    """The ETags beside a manifest, where they belong to it and to this URL: a copy has others."""
    if not isinstance(place, CachedFolder) or not place.exists(ETAGS):
        return {}
    found = json.loads(place.read(ETAGS).decode() or "{}")
    belongs = has_shape(found, _ETAGS_SHAPE) and (found["url"], found["manifest"]) == (mask(place.url), fingerprint)
    return found["etags"] if belongs else {}

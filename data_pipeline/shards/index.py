"""Sidecar indexes and the manifest of a folder of shards: what is where, and a fingerprint of the content.

`<shard>.index.jsonl` lies beside `<shard>.tar`: a header line, then one line per sample. `manifest.json` lists the
shards in the order that sample numbers follow. Own and foreign shards are indexed alike, by one pass over the tar.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import write_atomic
from data_pipeline.parallel import pool
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.storage import Storage, check_name, open_storage
from data_pipeline.shards.tarscan import ScannedSample, scan_tar

INDEX_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardInfo:
    """One line of the manifest; `sha256` is that of the shard's index: keys, places, checksums and content digest."""

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
        rows = [[shard.name, shard.samples, shard.size, shard.sha256] for shard in self.shards]
        content = {
            "version": INDEX_VERSION,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "samples": self.num_samples,
            "bytes": sum(shard.size for shard in self.shards),
            "origin": self.origin,
            "columns": ["name", "samples", "size", "sha256"],
        }
        head = json.dumps(content, indent=1)[:-2]
        body = ",\n  ".join(json.dumps(row) for row in rows)
        write_atomic(folder / MANIFEST, f'{head},\n "shards": [\n  {body}\n ]\n}}\n')


def load_manifest(storage: Storage) -> Manifest:
    """The manifest of a folder. Raises DataError when it is missing, damaged, or of another version."""
    if not storage.exists(MANIFEST):
        raise DataError(
            f"{storage.url}: no {MANIFEST}; run `alignvlm data index {storage.url}` on a folder of tar shards"
        )
    try:
        content = json.loads(storage.read(MANIFEST))
        if content["version"] != INDEX_VERSION:
            raise DataError(
                f"{storage.url}/{MANIFEST} has version {content['version']}, "
                f"this code reads {INDEX_VERSION}; index again"
            )
        shards = [ShardInfo(check_name(name), samples, size, sha) for name, samples, size, sha in content["shards"]]
        manifest = Manifest(content["source"], shards, content.get("origin", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{storage.url}/{MANIFEST} is damaged ({error!r}); run `alignvlm data index {storage.url}`"
        ) from error
    if manifest.fingerprint != content["fingerprint"]:
        raise DataError(
            f"{storage.url}/{MANIFEST} was edited: its fingerprint does not match its shards; index the folder again"
        )
    return manifest


def index_name(shard: str) -> str:
    """Name of the index beside a shard."""
    return f"{shard.removesuffix('.tar')}.index.jsonl"


def index_shards(
    folder: str | os.PathLike[str],
    *,
    source: str = "",
    origin: dict[str, Any] | None = None,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Index every `*.tar` under a local folder and write its manifest. Raises DataError for damaged shards.

    Works on shards of any WebDataset writer, img2dataset's among them. Indexes that fit their shard by size and time
    are kept.
    """
    storage = open_storage(folder)
    root = storage.local_path("x")
    if root is None:
        raise DataError(f"{storage.url}: only local folders are indexed")
    root = root.parent
    names = list(storage.list(".tar"))
    if not names:
        raise DataError(f"{root}: no .tar shards here")
    shards = []
    with pool(num_processes, len(names)) as executor, progress(f"index {source or root.name}", len(names)) as advance:
        for shard in _indexed(executor, root, names):
            shards.append(shard)
            advance(1)
    manifest = Manifest(source or root.name, shards, origin or {})
    manifest.save(root)
    return manifest


def index_shard(root: Path, name: str) -> ShardInfo:
    """Write the index of one shard; an index newer than its shard and of the same size is taken as it is."""
    path, target = root / name, root / index_name(name)
    size = path.stat().st_size
    if target.exists() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        data = target.read_bytes()
        try:
            header = json.loads(data.partition(b"\n")[0])
            if (
                header["version"] == INDEX_VERSION
                and header["size"] == size
                and data.count(b"\n") == header["samples"] + 1
            ):
                return ShardInfo(name, header["samples"], size, hashlib.sha256(data).hexdigest())
        except (ValueError, KeyError, TypeError):
            pass  # a damaged index is written anew below
    with path.open("rb") as file:
        data = index_bytes(list(scan_tar(file, size, str(path))), path.name, size)
    write_atomic(target, data)
    return ShardInfo(name, data.count(b"\n") - 1, size, hashlib.sha256(data).hexdigest())


def index_bytes(samples: list[ScannedSample], shard: str, size: int) -> bytes:
    """An index file: a header line, then one line per sample.

    {"key", "members": {extension: [offset, size, crc32]}, "sizes": [[width, height], …]}; the size of an image without
    a readable header is null.
    """
    content = hashlib.sha256()
    for sample in samples:
        content.update(sample.digest)
    header = {
        "version": INDEX_VERSION,
        "shard": shard,
        "size": size,
        "samples": len(samples),
        "sha256": content.hexdigest(),
    }
    lines = [json.dumps(header)]
    for sample in samples:
        lines.append(
            json.dumps(
                {"key": sample.key, "members": sample.members, "sizes": sample.image_sizes}, separators=(",", ":")
            )
        )
    return ("\n".join(lines) + "\n").encode()


def _indexed(executor: ProcessPoolExecutor | None, root: Path, names: list[str]) -> Iterator[ShardInfo]:
    if executor is None:
        return (index_shard(root, name) for name in names)
    return executor.map(index_shard, [root] * len(names), names, chunksize=max(1, min(16, len(names) // 64)))

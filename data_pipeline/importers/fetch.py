"""Copies the shards behind a URL into a local folder, with their indexes: whole, and each once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import must_write, open_atomic, write_atomic
from data_pipeline.masking import mask
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.sidecars import is_indexed
from data_pipeline.shards.storage import Storage, open_storage

OWNER = "fetched-from.txt"
_PIECE = 16 * 1024**2


def fetch_shards(url: str, folder: str | os.PathLike[str], *, progress: Progress = silent) -> Manifest:
    """Copy every shard of a folder behind a URL and index the copies; shards that are complete are not copied again.

    Args:
        url: a folder of shards in any storage; where it has a manifest, the copies must be what that lists.
        folder: new, or one of an earlier call with the same `url`.

    Raises:
        DataError: nothing is there, the copies are not what was indexed, or the folder holds something else.
    """
    storage = open_storage(url)
    known = load_manifest(storage) if is_indexed(storage) else None
    names = [shard.name for shard in known.shards] if known is not None else list(storage.list(".tar"))
    if not names:
        raise DataError(f"{mask(url)}: no .tar shards here")
    folder = Path(folder)
    _claim(folder, mask(url))
    with progress(f"fetch {folder.name}", len(names)) as advance:
        for name in names:
            _copy(storage, name, folder / name)
            advance(1)
    manifest = index_shards(folder, source=known.source if known else "", progress=progress)
    if known is not None and manifest.fingerprint != known.fingerprint:
        raise DataError(
            f"{folder}: the copies are not what {mask(url)}/manifest.json lists; run `alignvlm data index {mask(url)}`"
        )
    return manifest


def _claim(folder: Path, url: str) -> None:
    """The folder belongs to this URL: a file in it says so. Raises DataError when it does not."""
    owner = folder / OWNER
    if owner.exists() and owner.read_text(encoding="utf-8", errors="replace") == url + "\n":
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty and was not fetched from {url!r}; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(owner, url + "\n")


def _copy(storage: Storage, name: str, target: Path) -> None:
    """One shard as a file: whole, or not there."""
    if target.is_file() and target.stat().st_size == storage.size(name):
        return
    with must_write(target, "make room; what was copied is kept, run it again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(name) as source, open_atomic(target) as file:
            shutil.copyfileobj(source, file, _PIECE)

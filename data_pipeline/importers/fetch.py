"""Copies the shards behind a URL into a local folder, with their indexes: whole, and each once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import locked, must_write, open_atomic, read_json_lines, write_atomic
from data_pipeline.masking import mask
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import index_shards, no_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.sidecars import is_indexed
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.stores.failures import NoRoomError
from data_pipeline.stores.object_storage import ObjectStorage

OWNER, MARKS = "fetched-from.txt", "fetched.jsonl"
"""Whose copy a folder is; what each shard was there when it was copied."""
_PIECE = 16 * 1024**2
_WAY_OUT = "make room; what was copied is kept, run it again"


def fetch_shards(url: str, folder: str | os.PathLike[str], *, progress: Progress = silent) -> Manifest:
    """Copy every shard of a folder behind a URL and index the copies; copies that are what is there now stay.

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
        raise no_shards(storage)
    folder = Path(folder)
    _claim(folder, mask(url))
    with locked(folder / ".lock", _WAY_OUT):  # another call for this folder ends first
        _copy_missing(storage, names, known.sizes if known is not None else {}, folder, progress)
        manifest = index_shards(folder, source=known.source if known else "", progress=progress)
    if known is not None and manifest.fingerprint != known.fingerprint:
        others = {shard.name for shard in set(known.shards) ^ set(manifest.shards)}
        raise DataError(
            f"{folder / min(others)} is not what {mask(url)}/manifest.json lists: delete it and fetch again, or, where "
            f"the shards there are newer than their manifest, run `alignvlm data index {mask(url)}`"
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


def _copy_missing(
    storage: Storage, names: Sequence[str], sizes: Mapping[str, int], folder: Path, progress: Progress
) -> None:
    """Copy the shards that are not there as they are now, or were changed here; half a copy of a killed call goes.

    Raises DataError for one that has another size than `sizes` says.
    """
    for half in folder.rglob(".*.tmp"):
        half.unlink(missing_ok=True)
    marks = read_json_lines(folder / MARKS) if (folder / MARKS).exists() else []
    copied = {row.get("name"): row for row in marks}
    with progress(f"fetch {folder.name}", len(names)) as advance:
        for name, (mark, size) in zip(names, _marks(storage, names), strict=True):
            target, row = folder / name, copied.get(name, {})
            if str(row.get("mark")).strip('"') != mark or not _is_untouched(target, size, row.get("time")):
                _copy(storage, name, target, sizes.get(name))
                row = {"name": name, "mark": mark, "time": target.stat().st_mtime_ns}
                with must_write(folder / MARKS, _WAY_OUT), (folder / MARKS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            advance(1)


def _is_untouched(target: Path, size: int, written: int | None) -> bool:
    """Whether a copy is there as it was written; earlier versions did not note when that was."""
    if not target.is_file():
        return False
    status = target.stat()
    return status.st_size == size and written in (None, status.st_mtime_ns)


def _marks(storage: Storage, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """What changes when a shard is replaced, also by one of equal size (its ETag, or size and time), and its size."""
    if not isinstance(storage, ObjectStorage):
        for name in names:
            path, size = storage.local_path(name), storage.size(name)
            yield f"{size} bytes" + (f", {path.stat().st_mtime_ns}" if path else ""), size
        return
    listed = storage.listed(".tar")
    others = storage.heads(name for name in names if name not in listed)
    for name in names:
        info = listed[name] if name in listed else next(others)
        yield info.etag.strip('"') or f"{info.size} bytes, {info.modified}", info.size


def _copy(storage: Storage, name: str, target: Path, size: int | None) -> None:
    """One shard as a file: whole, or not there. Raises DataError where an object has not the size that is given."""
    with must_write(target, _WAY_OUT):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(target) as file:
            if isinstance(storage, ObjectStorage):
                info, url = storage.head(name), mask(storage.url)
                if info.size != (size or info.size):
                    raise DataError(
                        f"{url}/{name} has {info.size:,} bytes, and {size:,} in manifest.json there: put the shard "
                        f"back, or, where it is the newer one, run `alignvlm data index {url}`"
                    )
                storage.answered(name, info)
                try:
                    storage.download(name, Path(file.name))
                except NoRoomError as error:
                    raise DataError(f"{target} cannot be written ({error}); {_WAY_OUT}") from error
            else:
                with storage.open(name) as source:
                    shutil.copyfileobj(source, file, _PIECE)

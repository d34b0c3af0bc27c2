"""What a checkpoint consists of: its manifest, and whether its files are what that says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from alignvlm.best import STATE
from alignvlm.training.checkpoints.files.reading import checked
from alignvlm.training.checkpoints.files.written import Advance, Entry
from data_pipeline.files import has_shape, reason

FORMAT = 1
"""Version of the layout; a change is announced in CHANGELOG.md as breaking."""
MANIFEST = "manifest.json"
FILES = {str: {"size": int, "crc32": int}}
"""Shape of a list of files, by their names in the folder."""


def first_difference(folder: Path) -> str | None:
    """What is wrong with a checkpoint's manifest or one of its files; None when nothing is."""
    try:
        return difference(folder, read_manifest(folder))
    except ValueError as error:
        return str(error)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint.

    Raises:
        ValueError: what is wrong with the manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"manifest: {reason(error)}") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')}, this version reads {FORMAT}")
    if not has_shape(manifest, {"files": FILES}) or STATE not in manifest["files"]:
        raise ValueError("manifest: it does not list the files of a checkpoint")
    files: dict[str, Entry] = manifest["files"]
    return files


def difference(
    folder: Path, files: dict[str, Entry], rank: int = 0, world_size: int = 1, advance: Advance = lambda count: None
) -> str | None:
    """What is wrong with this rank's share of the files; `advance` hears of the bytes that have been read."""
    for name in sorted(files, key=by_kind_and_rank)[rank::world_size]:
        try:
            actual = checked(regular_file(folder, name), advance)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{name}: {reason(error)}"
        if (problem := mismatch(name, files[name], actual)) is not None:
            return problem
    return None


def mismatch(name: str, expected: Entry, actual: Entry) -> str | None:
    """What is wrong with a file, by its line in the manifest and what was read; None when nothing is."""
    return None if actual == expected else f"{name}: size or checksum differs from the manifest"


def files_in(folder: Path) -> list[str]:
    """Names of the regular files in a checkpoint, sorted; links are not followed.

    What a kill leaves of an atomic write is none of them.
    """
    found = (path for path in folder.rglob("*") if not (path.name.startswith(".") and path.suffix == ".tmp"))
    paths = (path for path in found if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(folder)) for path in paths)


def by_kind_and_rank(name: str) -> tuple[str, list[int]]:
    """Sort key: in this order each rank, of as many as have saved, checks the large files that it loads itself."""
    return re.sub(r"\d+", "", name), [int(number) for number in re.findall(r"\d+", name)]


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file; ValueError when it is no regular one inside the folder: a device might have no end."""
    path = folder / name
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise ValueError(f"{name}: it is missing or no regular file in the folder")
    return path


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

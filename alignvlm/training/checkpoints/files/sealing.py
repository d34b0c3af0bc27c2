"""From a folder with everybody's files to a checkpoint: the manifest is written last, and the name given then.

Each rank lists its files in the folder when it has written all of them. So a save that a job could not seal any more,
because another rank was killed, is sealed by the next one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from alignvlm.best import STATE
from alignvlm.training.checkpoints.files.manifest import FILES, FORMAT, MANIFEST, files_in, sync
from alignvlm.training.checkpoints.files.reading import checked
from alignvlm.training.checkpoints.files.written import Entry
from data_pipeline.files import read_json, write_atomic

SUFFIX = ".partial"
"""How the name of a folder ends that is not yet a checkpoint, or no longer one."""


def list_of(rank: int) -> str:
    """Name of the file in which a rank lists its files when it has written them."""
    return f"files-{rank:05d}.json"


def seal(partial: Path, final: Path, files: dict[str, Entry]) -> None:
    """Make the checkpoint `final` of a folder. Files that nobody lists, such as what DeepSpeed writes itself, are read.

    Raises:
        OSError: the disk fails.
    """
    files = dict(files)
    for name in set(files_in(partial)) - files.keys() - {MANIFEST}:
        files[name] = checked(partial / name)
        sync(partial / name)
    content = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_atomic(partial / MANIFEST, json.dumps(content, indent=1) + "\n")
    for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(folder)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)


def complete_saves(checkpoints: Path) -> dict[Path, dict[str, Entry]]:
    """Saves that all ranks had written and nobody has sealed: the checkpoint that each would be, and its files."""
    found = {}
    for partial in checkpoints.glob(f"step-*{SUFFIX}"):
        final = partial.with_name(partial.name.removesuffix(SUFFIX))
        if not final.name.removeprefix("step-").isdigit():
            continue
        try:
            files = None if final.exists() else listed_files(partial)
        except OSError:  # of a disk that fails: it is no checkpoint
            continue
        if files is not None:
            found[final] = files
    return found


def listed_files(partial: Path) -> dict[str, Entry] | None:
    """The files of all ranks, by their lists; None when a list or a file is missing, or somebody else's lie there."""
    size = read_json(partial / STATE, {"world_size": int}).get("world_size", 0)
    files: dict[str, Entry] = {}
    others = {MANIFEST}
    for rank in range(size):
        listed = read_json(partial / list_of(rank), FILES)
        if not listed:
            return None
        files |= listed
        others.add(list_of(rank))
    there = set(files_in(partial)) - others
    return files if there == files.keys() and STATE in files else None

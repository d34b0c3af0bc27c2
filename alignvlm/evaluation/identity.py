"""What results are kept by: a digest of everything that they depend on, files by their sizes and times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest(state: Any) -> str:
    """16 hex digits that change with anything in this JSON data."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size in bytes and time of the last change in ns of each file."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def files_of(folder: Path) -> list[Path]:
    """The files of a model's folder, sorted; [] where there is no such folder."""
    return sorted(folder.iterdir()) if folder.is_dir() else []

"""Warnings that many processes of a node would repeat: one a minute."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time

from data_pipeline.stores.folders import cache_folder

SECONDS = 60.0
log = logging.getLogger(__name__)


def warn_once_a_minute(subject: str, message: str) -> None:
    """Log a warning unless a process of this node said one of the same subject in the last minute."""
    name = hashlib.sha256(subject.encode()).hexdigest()[:16]
    try:
        folder = cache_folder() / "warnings"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            stat = os.fstat(file.fileno())
            if stat.st_size and time.time() - stat.st_mtime < SECONDS:
                return
            file.truncate(0)
            file.write(b"\n")
    except OSError:
        pass  # said too often rather than never
    log.warning("%s", message)

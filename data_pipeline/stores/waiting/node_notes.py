"""What the processes of a node tell each other: warnings that many would repeat, and what was waited for in vain.

<cache>/warnings/<hash of the subject>            when the last warning of this subject was
<cache>/warnings/<hash of the subject>.given-up   why a process gave up a store or an object, and by its time, when
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import DataError, UnreachableError
from data_pipeline.files import write_atomic
from data_pipeline.stores.folders import cache_folder, place_of, store_of

SECONDS = 60.0
GIVEN_UP = ".given-up"
log = logging.getLogger(__name__)


def warn_once_a_minute(subject: str, message: str) -> None:
    """Log a warning unless a process of this node said one of the same subject in the last minute."""
    try:
        with _note(subject).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            stat = os.fstat(file.fileno())
            if stat.st_size and abs(time.time() - stat.st_mtime) < SECONDS:  # else the clock was set back since
                return
            file.truncate(0)
            file.write(b"\n")
    except (OSError, DataError):
        pass  # said too often rather than never
    log.warning("%s", message)


def note_given_up(subject: str, why: str) -> None:
    """Tell the node's other processes that a store, or the place of an object, was waited for as long as anyone may."""
    with suppress(OSError, DataError):  # then they wait for it too
        write_atomic(_note(subject, GIVEN_UP), why)


def raise_if_given_up(url: str, names: Iterable[str], since: float) -> None:
    """Give up too what another process gave up while this one waited for it, from `since` on (seconds since 1970).

    Raises:
        UnreachableError: a process of this node gave up the store, or one of these objects of a URL's folder,
            meanwhile. Each waiting in its turn would take hours.
    """
    if notes := _new_notes(since):  # seldom any: there may be names by the hundred thousand
        for subject in (store_of(url), *(place_of(url, name) for name in names)):
            if why := notes.get(_name(subject, GIVEN_UP)):
                raise UnreachableError(why)


def _new_notes(since: float) -> dict[str, str]:
    """What was given up since then: name of the note -> why."""
    notes: dict[str, str] = {}
    until = time.time() + SECONDS  # likewise; a file server's clock may be ahead
    with suppress(OSError, DataError), os.scandir(_folder()) as entries:
        for entry in entries:
            if entry.name.endswith(GIVEN_UP) and since < entry.stat().st_mtime < until:
                notes[entry.name] = Path(entry).read_text(encoding="utf-8")
    return notes


def _note(subject: str, suffix: str = "") -> Path:
    return _folder() / _name(subject, suffix)


def _folder() -> Path:
    folder = cache_folder() / "warnings"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _name(subject: str, suffix: str) -> str:
    return hashlib.sha256(subject.encode()).hexdigest()[:16] + suffix

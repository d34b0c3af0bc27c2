"""Where a node keeps what it fetched or made: ALIGNVLM_CACHE, or `alignvlm` in the user's folder for caches.

And the names that a folder of shards has in every store.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from data_pipeline.errors import DataError

log = logging.getLogger(__name__)
VARIABLE = "ALIGNVLM_CACHE"
MANIFEST, ETAGS = "manifest.json", "etags.json"
"""Every folder of shards has the first; a remote one that was written here has the second too."""


def cache_folders() -> Iterator[Path]:
    """Folders for caches; the first one that can be written is taken."""
    own = os.environ.get(VARIABLE, "")
    if os.path.isabs(own):
        yield Path(own)
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the standard has other values ignored
        home = os.path.expanduser("~/.cache")
    if os.path.isabs(home):
        yield Path(home) / "alignvlm"
    temporary = Path(tempfile.gettempdir()) / f"alignvlm-{os.getuid()}"
    if not os.path.lexists(temporary) or temporary.lstat().st_uid == os.getuid():  # no other user's folder is believed
        yield temporary


def cache_folder() -> Path:
    """The first of them that can be written. Raises DataError when none can."""
    own = os.environ.get(VARIABLE, "")
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            if own and folder != Path(own):
                _say_not_taken(own, folder)
            return folder
    raise DataError(f"no folder for caches can be written; let {VARIABLE} name one that can")


@cache
def _say_not_taken(own: str, folder: Path) -> None:
    """Say, once in a process, that the user's folder for caches cannot be used."""
    why = "cannot be written" if os.path.isabs(own) else "is not an absolute path"
    log.warning("%s=%s %s: the cache is %s", VARIABLE, own, why, folder)


def canonical(url: str) -> str:
    """One way to write the URL of a folder: the scheme in small letters, no slash at the end."""
    scheme, separator, rest = url.partition(":")
    return f"{scheme.lower()}{separator}{rest.rstrip('/')}"


@lru_cache(256)  # asked for with every request
def store_of(url: str) -> str:
    """The bucket, container or host in which a URL's folder lies, as `s3://bucket`; the Hub's data sets are one."""
    return "/".join(canonical(url).split("/")[:3])


def place_of(url: str, name: str) -> str:
    """An object of a URL's folder, or the folder, as one string."""
    return f"{canonical(url)}/{name}".rstrip("/")


def node_folder(url: str) -> Path:
    """The folder of this node's cache for a remote folder."""
    return cache_folder() / "folders" / hashlib.sha256(canonical(url).encode()).hexdigest()[:16]


def local_folder(folder: str) -> Path:
    """Where what is made for a folder is kept: the folder itself, or for a URL its folder in this node's cache."""
    return node_folder(folder) if "://" in folder else Path(folder)

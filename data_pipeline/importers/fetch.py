"""Copies shards that a shell command prints (`pipe:` URLs, as webdataset has them) into a local folder.

A data path never runs a command by itself: this is the one place that does, and only when told so explicitly.
"""

from __future__ import annotations

import os
import re
import subprocess
from itertools import islice
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import open_atomic, write_atomic
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import Manifest, index_shards

MAX_SHARDS = 1_000_000
"""Of one URL."""


def fetch_shards(
    url: str, folder: str | os.PathLike[str], *, allow_pipe: bool = False, progress: Progress = silent
) -> Manifest:
    """Run `pipe:COMMAND` for each shard and index what they print; shards that are complete are not fetched again.

    Args:
        url: braces count as in webdataset: `pipe:curl -sf https://host/{0000..0099}.tar` are a hundred shards.
        folder: new, or one of an earlier call with the same `url`; gets 000000.tar, 000001.tar, …
        allow_pipe: the commands are trusted.

    Raises:
        DataError: no `pipe:` URL, not allowed, a command failed, or the folder holds something else.
    """
    if not url.startswith("pipe:"):
        raise DataError(f"{url!r} is no pipe: URL; copy the shards to a folder and run `alignvlm data index` on it")
    if not allow_pipe:
        raise DataError(f"{url!r} runs a shell command; if you trust it, say so with --allow-pipe")
    commands = _commands(url)
    folder = Path(folder)
    _claim(folder, url)
    with progress(f"fetch {folder.name}", len(commands)) as advance:
        for number, command in enumerate(commands):
            target = folder / f"{number:06d}.tar"
            if not target.exists():
                _run(command, target)
            advance(1)
    return index_shards(folder, origin={"fetched": url}, progress=progress)


def _commands(url: str) -> list[str]:
    """The command of each shard. Raises DataError for braces that do not match, or stand for too many shards."""
    from braceexpand import braceexpand

    too_many = f"{url!r} stands for more than {MAX_SHARDS:,} shards; fetch them in parts"
    try:
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", url)  # expanded as a whole, unlike their products
        if any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges):
            raise DataError(too_many)
        commands = [each.removeprefix("pipe:") for each in islice(braceexpand(url), MAX_SHARDS + 1)]
    except ValueError as error:
        raise DataError(f"{url!r}: its braces do not match ({error})") from error
    if len(commands) > MAX_SHARDS:
        raise DataError(too_many)
    return commands


def _claim(folder: Path, url: str) -> None:
    """The folder belongs to this URL: `fetched-from.txt` in it says so. Raises DataError when it does not."""
    owner = folder / "fetched-from.txt"
    if owner.exists() and owner.read_text(encoding="utf-8", errors="replace") == url + "\n":
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty and was not fetched from {url!r}; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(owner, url + "\n")


def _run(command: str, target: Path) -> None:
    """The command's output as a file: whole, or not there."""
    with open_atomic(target) as file:
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
        if done.returncode != 0 or os.fstat(file.fileno()).st_size == 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            why = said[-1] if said else "it said nothing"
            what = f"exited with {done.returncode}" if done.returncode else "printed nothing"
            raise DataError(f"{target.name}: `{command}` {what} ({why}); the shards before it are kept, run it again")

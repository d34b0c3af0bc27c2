"""The quarantine ledger: every bad sample once, over ranks, epochs and resumes; too many of them stop training."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import LoadError
from data_pipeline.files import read_new_lines, reason
from data_pipeline.shards.sources import BadSample

log = logging.getLogger(__name__)

LINE = {"source": str, "shard": str, "key": str}
"""What every line of the ledger has."""
MIN_BAD = 10
"""This many bad samples are tolerated regardless of their fraction."""


class Ledger:
    """`quarantine.jsonl`: one line {"source", "shard", "key", "error"} per bad sample.

    Ranks may share the file: a line is written under a lock after reading what others wrote. Lines that the disk does
    not take wait for the next bad sample.

    Args:
        path: the file; it and its folder are created with the first bad sample.
        max_bad_fraction: `record` raises when more than MIN_BAD samples, and more than this fraction of those that
            this process saw, were bad.
    """

    def __init__(self, path: str | os.PathLike[str], max_bad_fraction: float = 0.01) -> None:
        self.path, self.max_bad_fraction = Path(path), max_bad_fraction
        self.num_seen = self.num_bad = 0
        self._known: set[tuple[str, str, str]] = set()
        self._read = 0
        self._waiting: list[BadSample] = []

    def record(self, num_seen: int, bad: Iterable[BadSample]) -> None:
        """Count `num_seen` samples, the bad ones among them, and write down those that are new.

        Raises LoadError past the threshold.
        """
        bad = list(bad)
        self.num_seen += num_seen
        self.num_bad += len(bad)
        if bad:
            try:
                self._write([*self._waiting, *bad])
                self._waiting = []
            except OSError as error:
                if not self._waiting:
                    log.warning("%s cannot be written (%s): its lines wait in memory", self.path, reason(error))
                self._waiting += bad
            if self.num_bad > MIN_BAD and self.num_bad > self.max_bad_fraction * self.num_seen:
                last = bad[-1]
                raise LoadError(
                    f"{self.num_bad} of {self.num_seen} samples were bad, "
                    f"more than data.max_bad_fraction {self.max_bad_fraction:g}; "
                    f"see {self.path} (last: {last.source}/{last.shard}/{last.key}: {last.error})"
                )

    def _write(self, bad: list[BadSample]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            samples = {(sample.source, sample.shard, sample.key): sample for sample in bad}
            new = {key: vars(sample) for key, sample in samples.items() if key not in self._known}
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values())
            file.write(lines.encode(errors="backslashreplace"))
            file.flush()
            self._known |= new.keys()
            self._read = os.fstat(file.fileno()).st_size

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what other processes or an earlier run wrote. A last line that a crash cut off is ended first."""
        rows, end = read_new_lines(file, self._read, LINE)
        self._known.update((row["source"], row["shard"], row["key"]) for row in rows)
        if end < os.fstat(file.fileno()).st_size:
            file.write(b"\n")

"""Files with checksums, computed while `torch.save` writes one.

Another thread lets the disk take what is written: it works while the next bytes are summed up and copied. Nothing is
read back.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data_pipeline.checksums import crc32

BLOCK = 1 << 22
"""Bytes that are summed up and written at once, while they are in the processor's cache."""
PIECE = 1 << 26
"""Bytes after which the file is flushed."""
AHEAD = 4
"""Pieces that may be written before the disk has taken the first of them: progress is seen on a slow disk too."""
Advance = Callable[[int], object]
Entry = dict[str, int]
"""What the manifest says of a file: `size` in bytes and `crc32`."""


class CheckedFile:
    """`with CheckedFile(path, advance) as file: torch.save(state, file)`; a disk error is raised at its end.

    An exception in `write` would have to pass through PyTorch's C++ writer. `advance` hears, in another thread, of the
    bytes that the disk has taken.
    """

    def __init__(self, path: str, advance: Advance) -> None:
        self._file, self._advance = io.FileIO(path, "w"), advance
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-flush")
        self._flushes: deque[Future[None]] = deque()
        self._unflushed = 0
        self._error: OSError | None = None
        self.entry: Entry = {"size": 0, "crc32": 0}

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self._error is None:
                self._flush(leave=0)
        except OSError as error:
            self._error = error
        self._flusher.shutdown(wait=True)
        self._file.close()
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """Write all of it; after an error nothing more."""
        view = memoryview(data).cast("B")
        try:
            for begin in range(0, len(view), BLOCK):
                if self._error is None:
                    self._write(view[begin : begin + BLOCK])
        except OSError as error:
            self._error = error
        return len(view)

    def flush(self) -> None:
        """Do nothing: the end of the `with` block waits for the disk."""

    def _write(self, block: memoryview) -> None:
        size = len(block)
        self.entry = {"size": self.entry["size"] + size, "crc32": crc32(block, self.entry["crc32"])}
        while block:
            block = block[self._file.write(block) :]
        self._unflushed += size
        if self._unflushed >= PIECE:
            self._flush(leave=AHEAD - 1)

    def _flush(self, leave: int) -> None:
        """Flush what has been written, and wait until all but `leave` of the flushes are done."""
        self._flushes.append(self._flusher.submit(self._sync, self._unflushed))
        self._unflushed = 0
        while len(self._flushes) > leave:
            self._flushes.popleft().result()

    def _sync(self, count: int) -> None:
        os.fsync(self._file.fileno())
        self._advance(count)

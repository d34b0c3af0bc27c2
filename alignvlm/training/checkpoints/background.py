"""A DeepSpeed checkpoint engine that writes in threads: training waits for a copy to host memory, not for the disk.

A disk error is kept and returned by `result`. It is never raised inside DeepSpeed's collective save, where it would
leave the other ranks waiting: so DeepSpeed itself may write nothing there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from alignvlm.training.checkpoints.files.written import Advance, CheckedFile, Entry
from alignvlm.training.checkpoints.staging import Staging
from data_pipeline.checksums import crc32
from data_pipeline.files import write_atomic

# DeepSpeed's autotuner, which nothing here uses, imports MLflow where there is one: a fifth of the start of every rank.
_hides_mlflow = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
try:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
finally:
    if _hides_mlflow:
        del sys.modules["mlflow"]

T = TypeVar("T")
THREADS = 4
"""Files that are written at the same time."""


class BackgroundCheckpointEngine(TorchCheckpointEngine):
    """Replaces `engine.checkpoint_engine`; one save at a time."""

    def __init__(self, config: Any, device: torch.device, advance: Advance = lambda count: None) -> None:
        """`advance` hears, in a thread, of the bytes that the disk has taken."""
        super().__init__(config)
        self._device, self._advance = device, advance
        self._staging: dict[str, Staging] = {}
        self._pool = ThreadPoolExecutor(THREADS, "checkpoint", initializer=_write_no_checksums_of_torch)
        self._copied: list[tuple[str, Any]] = []
        self._writes: dict[Path, Future[Entry]] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the tensors to host memory, for a file that `write` writes. A lack of memory is an error of the file."""
        staging = self._staging.setdefault(Path(path).name, Staging(self._device))
        try:
            self._copied.append((path, staging.copy(state_dict)))
        except OSError as error:
            failed: Future[Entry] = Future()
            failed.set_exception(error)
            self._writes[Path(path)] = failed

    def write(self) -> None:
        """Let threads write what has been copied: once all has, since they would compete with the copies."""
        for path, state in self._copied:
            self._writes[Path(path)] = self.submit(self._write, state, path)
        self._copied.clear()

    def save_text(self, path: Path, text: str) -> None:
        """Write a small text file, also in a thread."""
        self._writes[path] = self.submit(_write_text, path, text)

    def save_list(self, path: Path) -> None:
        """Write, when all files before it have been written, a list of them, relative to its own folder."""
        self._writes[path] = self.submit(_write_list, path, dict(self._writes))

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call `work` in one of the threads that write."""
        return self._pool.submit(work, *arguments)

    def is_decoupled(self) -> bool:
        """Tell DeepSpeed not to write its file `latest`: checkpoints are found by their names."""
        return True

    @property
    def done(self) -> bool:
        """Whether all files have been written or have failed."""
        return all(write.done() for write in self._writes.values())

    def result(self) -> tuple[dict[Path, Entry], str | None]:
        """Wait for the writes; size and checksum of each file that was written, and the first error, or None."""
        writes, self._writes = self._writes, {}
        errors = [error for write in writes.values() if (error := write.exception()) is not None]
        entries = {path: write.result() for path, write in writes.items() if write.exception() is None}
        return entries, next((f"{type(error).__name__}: {error}" for error in errors), None)

    def cleanup(self) -> None:
        """Wait for the writes, end the threads and give the memory back."""
        self._pool.shutdown(wait=True)
        for staging in self._staging.values():
            staging.close()

    def _write(self, state: Any, path: str) -> Entry:
        with CheckedFile(path, self._advance) as file:
            super().save(state, file)
        return file.entry


def _write_text(path: Path, text: str) -> Entry:
    content = text.encode()
    write_atomic(path, content)
    return {"size": len(content), "crc32": crc32(content)}


def _write_list(path: Path, writes: dict[Path, Future[Entry]]) -> Entry:
    """Threads take their work in turn: those that this one waits for have begun."""
    entries = {str(file.relative_to(path.parent)): write.result() for file, write in writes.items()}
    return _write_text(path, json.dumps(entries, indent=1) + "\n")


def _write_no_checksums_of_torch() -> None:
    """PyTorch's own of each tensor are slow, are not looked at when it loads, and the manifest has better ones."""
    torch.serialization.set_crc32_options(False)  # of this thread

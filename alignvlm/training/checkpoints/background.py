"""A DeepSpeed checkpoint engine that writes in a thread: training waits for a copy to host memory, not for the disk.

A disk error is kept and returned by `result`. It is never raised inside DeepSpeed's collective save, where it would
leave the other ranks waiting: so DeepSpeed itself may write nothing there.

What is written is flushed to the disk as it goes: bytes that a slow disk has not taken yet do not count as progress.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data_pipeline.files import write_atomic

# DeepSpeed's autotuner, which nothing here uses, imports MLflow where there is one: a fifth of the start of every rank.
_hides_mlflow = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
try:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
finally:
    if _hides_mlflow:
        del sys.modules["mlflow"]

PIECE = 1 << 26
"""Bytes that are written and flushed at a time."""
Advance = Callable[[int], object]


class BackgroundCheckpointEngine(TorchCheckpointEngine):
    """Replaces `engine.checkpoint_engine`; one save at a time."""

    def __init__(self, config: Any, advance: Advance = lambda count: None) -> None:
        """`advance` hears, in the thread, of the bytes that the disk has taken."""
        super().__init__(config)
        self._advance = advance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: list[Future[None]] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the tensors to host memory and return; a thread writes the file."""
        self._writes.append(self._pool.submit(self._write, snapshot(state_dict, {}), path))

    def save_text(self, path: Path, text: str) -> None:
        """Write a small text file in the same thread."""
        self._writes.append(self._pool.submit(write_atomic, path, text))

    def is_decoupled(self) -> bool:
        """DeepSpeed then writes no file `latest`; checkpoints are found by their names."""
        return True

    @property
    def done(self) -> bool:
        """Whether all files have been written or have failed."""
        return all(write.done() for write in self._writes)

    def result(self) -> str | None:
        """Wait for the writes; returns the first error, or None."""
        errors = [write.exception() for write in self._writes]
        self._writes = []
        return next((f"{type(e).__name__}: {e}" for e in errors if e is not None), None)

    def cleanup(self) -> None:
        """Wait for the writes and end the thread."""
        self._pool.shutdown(wait=True)

    def _write(self, state: Any, path: str) -> None:
        with FlushedFile(path, self._advance) as file:
            super().save(state, file)


class FlushedFile:
    """A file for `torch.save` that reaches the disk piece by piece; a disk error is raised at its end.

    An exception in `write` would have to pass through PyTorch's C++ writer.
    """

    def __init__(self, path: str, advance: Advance) -> None:
        self._file, self._advance = io.FileIO(path, "w"), advance
        self._unflushed = 0
        self._error: OSError | None = None

    def __enter__(self) -> FlushedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()
        self._file.close()
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """Write all of it; after an error nothing more."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self._error is None:
                count = self._file.write(left[: PIECE - self._unflushed])
                left = left[count:]
                self._unflushed += count
                if self._unflushed == PIECE:
                    self._flush()
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        """Let the disk take what is written."""
        try:
            if self._error is None:
                self._flush()
        except OSError as error:
            self._error = error

    def _flush(self) -> None:
        os.fsync(self._file.fileno())
        count, self._unflushed = self._unflushed, 0
        self._advance(count)


def snapshot(tree: Any, copies: dict[tuple[int, Any, Any], torch.Tensor]) -> Any:
    """The same structure with every tensor copied to the CPU; views of the same memory stay one copy."""
    if isinstance(tree, torch.Tensor):
        key = (tree.data_ptr(), tree.shape, tree.stride())
        if tree.numel() == 0 or key not in copies:
            copies[key] = tree.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(tree, dict):
        return type(tree)((k, snapshot(v, copies)) for k, v in tree.items())
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(snapshot(v, copies) for v in tree)
    return tree

"""Shared memory for tiles that is used again: fresh pages from the system cost many times what filling them does.

The training process allocates a block for each micro-batch to be made, a loader process fills it, and the block is
freed by itself when no tensor uses it any more. docs/log.md has the measurement without it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

CAPACITY = 4 * 1024**3
"""Address space of one memory, bytes. Only pages that were ever allocated take up real memory."""
_PAGE = 4096
_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, TileMemory] = weakref.WeakValueDictionary()


class TileMemory:
    """Memory that this process shares with those it forks afterwards; pickled between them, it stays the same one."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.buffer = mmap.mmap(-1, capacity)
        self._sizes: dict[int, int] = {}  # offset -> size of every allocated block
        self._freed: deque[int] = deque()
        self._number = next(_numbers)
        _memories[self._number] = self

    def allocate(self, size: int) -> Block | None:
        """The first `size` bytes that are free; None when there are none, or no bytes are wanted."""
        while self._freed:
            del self._sizes[self._freed.popleft()]
        size += -size % _PAGE
        begin = 0
        for offset, taken in sorted(self._sizes.items()):
            if offset - begin >= size:
                break
            begin = offset + taken
        if size == 0 or begin + size > self.capacity:
            return None
        self._sizes[begin] = size
        return Block(self, begin, size)

    def free(self, offset: int) -> None:
        """The block at `offset` may be allocated again. Any thread may call this at any moment."""
        self._freed.append(offset)

    def __reduce__(self) -> tuple[Callable[[int], TileMemory], tuple[int]]:
        return _memory, (self._number,)


def _memory(number: int) -> TileMemory:
    return _memories[number]


@dataclass(frozen=True)
class Block:
    """Bytes of a memory, as both processes name them."""

    memory: TileMemory
    offset: int
    size: int

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The first bytes as uint8 of this shape, to be filled."""
        return _as_tensor(self._bytes(), shape)

    def owning_tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The same for the process that allocated the block: it is freed with the last view of this tensor."""
        array = self._bytes()
        weakref.finalize(array, self.memory.free, self.offset)
        return _as_tensor(array, shape)

    def _bytes(self) -> np.ndarray:
        return np.frombuffer(self.memory.buffer, np.uint8, self.size, self.offset)


def _as_tensor(array: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor keeps the array alive, and so does every view of it."""
    return torch.from_numpy(array)[: math.prod(shape)].view(shape)

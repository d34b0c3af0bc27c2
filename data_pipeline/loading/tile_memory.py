"""Shared memory for tiles that is used again: fresh pages from the system cost many times what filling them does.

The training process lends a piece with each micro-batch to make, a loader process fills it, and the piece comes back by
itself when no tensor uses it any more.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

CAPACITY = 4 * 1024**3
"""Address space of one memory, bytes. Only pages that were ever lent take up real memory."""
_PAGE = 4096
_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, TileMemory] = weakref.WeakValueDictionary()


class TileMemory:
    """Memory that this process shares with those it forks afterwards; pickled between them, it stays the same one."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.buffer = mmap.mmap(-1, capacity)
        self._lent: dict[int, int] = {}
        self._returned: deque[int] = deque()
        self._number = next(_numbers)
        _memories[self._number] = self

    def lend(self, size: int) -> Piece | None:
        """The first `size` bytes that are free; None when there are none, or no bytes are wanted."""
        while self._returned:
            del self._lent[self._returned.popleft()]
        size += -size % _PAGE
        begin = 0
        for offset, taken in sorted(self._lent.items()):
            if offset - begin >= size:
                break
            begin = offset + taken
        if size == 0 or begin + size > self.capacity:
            return None
        self._lent[begin] = size
        return Piece(self, begin, size)

    def take_back(self, offset: int) -> None:
        """A piece may be lent again. Any thread may call this at any moment."""
        self._returned.append(offset)

    def __reduce__(self) -> tuple[Callable[[int], TileMemory], tuple[int]]:
        return _memory, (self._number,)


def _memory(number: int) -> TileMemory:
    return _memories[number]


@dataclass(frozen=True)
class Piece:
    """Bytes of a memory."""

    memory: TileMemory
    offset: int
    size: int

    def array(self) -> np.ndarray:
        """The bytes, uint8 [size]."""
        return np.frombuffer(self.memory.buffer, np.uint8, self.size, self.offset)

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The first bytes as uint8 of this shape."""
        return _tensor(self.array(), shape)


class Travelling:
    """A piece's tensor on its way back: unpickled, it is a tensor, and the piece returns when nothing uses that one."""

    def __init__(self, piece: Piece, shape: tuple[int, ...]) -> None:
        self.piece, self.shape = piece, shape

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        return _arrive, (self.piece, self.shape)


def _arrive(piece: Piece, shape: tuple[int, ...]) -> torch.Tensor:
    array = piece.array()
    weakref.finalize(array, piece.memory.take_back, piece.offset)
    return _tensor(array, shape)


def _tensor(array: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor keeps the array alive, and so does every view of it."""
    return torch.from_numpy(array)[: math.prod(shape)].view(shape)

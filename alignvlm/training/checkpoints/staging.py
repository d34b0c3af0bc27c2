"""Host memory that saves copy their tensors into: allocated once, page-locked where there is a GPU, and reused.

Fresh memory would cost several times the copy: the kernel clears every page of it at the first touch.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

log = logging.getLogger(__name__)
ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes."""


class Staging:
    """The memory of one file of a checkpoint; it grows to the largest state that was copied."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the tensors are; for a GPU the memory is page-locked."""
        self._device = device
        self._memory: mmap.mmap | None = None
        self._is_pinned = False

    def copy(self, tree: Any) -> Any:
        """The same structure with every tensor copied to this memory, valid until the next call.

        What is the same memory in the same form stays one tensor. All copies have been made when it returns.
        """
        places, end = {}, 0
        for key, tensor in _tensors(tree):
            if key not in places:
                places[key] = tensor, end
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        memory = self._of_size(end)
        copies = {}
        for key, (tensor, offset) in places.items():
            copies[key] = copied = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.numel():
                flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                copies[key] = copied = flat.view(tensor.shape)
            copied.copy_(tensor.detach(), non_blocking=self._is_pinned)
        if self._is_pinned:
            torch.cuda.synchronize(self._device)
        return _replaced(tree, copies)

    def close(self) -> None:
        """Give the memory back, once no copy is used any more."""
        if self._memory is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(_address(self._memory))
        self._memory, self._is_pinned = None, False

    def _of_size(self, size: int) -> mmap.mmap | None:
        if size and (self._memory is None or len(self._memory) < size):
            self.close()
            self._memory = mmap.mmap(-1, size)
            with suppress(AttributeError, OSError):  # a system that has no large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            if self._device.type == "cuda":
                self._pin(self._memory)
        return self._memory

    def _pin(self, memory: mmap.mmap) -> None:
        result = int(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), 0))
        self._is_pinned = result == 0
        if not self._is_pinned:
            log.warning("saves are slower: %d bytes of host memory cannot be page-locked (%d)", len(memory), result)
            with suppress(RuntimeError):  # CUDA tells the next caller of the error, who is not concerned
                torch.zeros(1, device=self._device)


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _tensors(tree: Any) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield _key(tree), tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif _is_list(tree):
        for value in tree:
            yield from _tensors(value)


def _replaced(tree: Any, copies: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return copies[_key(tree)]
    if isinstance(tree, dict):
        return type(tree)((key, _replaced(value, copies)) for key, value in tree.items())
    if _is_list(tree):
        return type(tree)(_replaced(value, copies) for value in tree)
    return tree


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list | tuple) and not hasattr(tree, "_fields")

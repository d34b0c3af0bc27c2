"""Reads a file once: its parts to where they belong, and its checksum on the way, while the bytes are in the cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from alignvlm.training.checkpoints.files.written import Advance, Entry
from data_pipeline.checksums import crc32, crc32_combine

BLOCK = 1 << 22
"""Bytes that are read and summed up at once, while they are in the processor's cache."""
PIECE = 1 << 26
"""Bytes that a thread takes at once."""
THREADS = 4
"""How many threads read: filling new memory from a file's pages takes one processor longer than the disk does."""


class Part(NamedTuple):
    """Numbers in a file."""

    offset: int
    """Place of their first byte in the file."""
    dtype: torch.dtype
    """Their type in the file."""
    target: torch.Tensor
    """Where they go: as many numbers in one dimension, contiguous, of any type, on any device."""

    @property
    def size(self) -> int:
        """Bytes that they take in the file."""
        return self.target.numel() * self.dtype.itemsize


class _Span(NamedTuple):
    """At most BLOCK bytes of a file, and the numbers that they are."""

    begin: int
    size: int
    part: Part | None


def checked(path: Path, advance: Advance = lambda count: None, parts: Iterable[Part] = ()) -> Entry:
    """Size and checksum of a file, all of which is read, its `parts` to their targets.

    `advance` hears of the bytes that have been read.

    Raises:
        OSError: it cannot be read, or becomes shorter meanwhile. ValueError: parts overlap or lie outside of it.
    """
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS, "read") as threads:
        size, checksum = os.fstat(file.fileno()).st_size, 0
        pieces = list(_pieces(_all_of(_spans(parts, size), size)))
        sums = threads.map(functools.partial(_read, file.fileno(), is_summed=True), pieces)
        for count, piece in sums:
            checksum = crc32_combine(checksum, piece, count)
            advance(count)
    return {"size": size, "crc32": checksum}


def read_parts(path: Path, parts: Iterable[Part], advance: Advance = lambda count: None) -> None:
    """Read these parts of a file, and nothing else of it; `checked` says what is raised."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS, "read") as threads:
        pieces = list(_pieces(_spans(parts, os.fstat(file.fileno()).st_size)))
        for count, _ in threads.map(functools.partial(_read, file.fileno(), is_summed=False), pieces):
            advance(count)


def _spans(parts: Iterable[Part], size: int) -> Iterator[_Span]:
    """The parts in the order of the file, cut into blocks."""
    end = 0
    for part in sorted((part for part in parts if part.size), key=lambda part: part.offset):
        if part.offset < end or part.offset + part.size > size:
            raise ValueError(f"bytes {part.offset:,} to {part.offset + part.size:,} of {size:,} do not stand alone")
        end = part.offset + part.size
        begin = part.offset
        for numbers in part.target.split(BLOCK // part.dtype.itemsize):
            block = Part(begin, part.dtype, numbers)
            yield _Span(begin, block.size, block)
            begin += block.size


def _all_of(spans: Iterable[_Span], size: int) -> Iterator[_Span]:
    """These spans and what lies between them, up to the end of the file."""
    end = 0
    for span in (*spans, None):
        following = size if span is None else span.begin
        for begin in range(end, following, BLOCK):
            yield _Span(begin, min(BLOCK, following - begin), None)
        if span is not None:
            yield span
            end = span.begin + span.size


def _pieces(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Spans in a row for one thread."""
    piece, size = [], 0
    for span in spans:
        piece.append(span)
        size += span.size
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _read(descriptor: int, piece: Sequence[_Span], is_summed: bool) -> tuple[int, int]:
    """Bytes of the spans, and their checksum."""
    buffer, count, checksum = bytearray(), 0, 0
    for begin, size, part in piece:
        is_direct = part is not None and part.target.device.type == "cpu" and part.target.dtype == part.dtype
        if part is not None and is_direct:
            view = memoryview(part.target.view(torch.uint8).numpy())  # type: ignore[arg-type]
        else:
            buffer = buffer or bytearray(BLOCK)
            view = memoryview(buffer)[:size]
        _fill(descriptor, view, begin)
        if is_summed:
            checksum = crc32(view, checksum)
        if part is not None and not is_direct:
            part.target.copy_(torch.frombuffer(view, dtype=part.dtype))
        count += size
    return count, checksum


def _fill(descriptor: int, view: memoryview, begin: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], begin)
        if not count:
            raise OSError(f"it ends at byte {begin:,}, earlier than before")
        view, begin = view[count:], begin + count

"""Documents of a micro-batch as one flat sequence; `cu_seqlens` and `position_ids` keep them apart in attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.tile_memory import Block
from data_pipeline.samples.schema import IGNORE_INDEX, Encoded

ON_HOST = ("cu_seqlens", "document_sources")
SMALL = 2**20
"""Bytes up to which a tensor goes to another process by value. By reference it takes a connection between the two, some
0.4 ms, and there are nine of them in a micro-batch."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains on at once: its packs as one sequence of T tokens.

    A micro-batch without documents holds one pad document of one token, so that every rank makes the same calls.
    """

    input_ids: torch.Tensor
    """int64 [1, T]."""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in every document."""
    cu_seqlens: torch.Tensor
    """int32 [documents + 1]: where documents begin, and T. Stays on the host, where attention is laid out."""
    max_seqlen: int
    """Tokens of the longest document."""
    tiles: torch.Tensor
    """uint8 [K, 3, S, S]; K may be 0, and S is 0 when there was no document to tell it."""
    visual_positions: torch.Tensor
    """int64 [V], ascending: where the visual tokens of the tiles are among the T tokens."""
    target_positions: torch.Tensor
    """int64 [M], ascending: the tokens whose next token, in the same document, is supervised."""
    targets: torch.Tensor
    """int64 [M]: these next tokens."""
    target_sources: torch.Tensor
    """int64 [M]: numbers of the sources that they come from, in the order of the mixture."""
    document_sources: torch.Tensor
    """int64 [documents]: number of each document's source. Stays on the host, where documents are counted."""
    keys: list[str]
    """"source/shard/key" of each document."""
    num_samples: int
    """Documents, bad ones and the pad document not counted."""
    step: int
    """Optimizer step (from 0) in the plan."""
    epoch: int
    """Epoch (from 0) in the plan."""

    @property
    def num_supervised(self) -> int:
        """Tokens with a loss. A document's first token has none: it is predicted from nothing."""
        return len(self.targets)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MicroBatch:
        """The same on another device, except what stays on the host."""
        moved = {name: tensor for name, tensor in self._tensors().items() if name not in ON_HOST}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in moved.items()})

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, for copies to a GPU that overlap with work."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def __reduce__(self) -> tuple[Callable[..., MicroBatch], tuple[Any, ...]]:
        values = (getattr(self, field.name) for field in fields(self))
        return _received, tuple(value.numpy() if _is_small(value) else value for value in values)

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _is_small(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.nbytes <= SMALL


def _received(*values: Any) -> MicroBatch:
    received: list[Any] = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    return MicroBatch(*received)


class TileStack:
    """Tiles of a micro-batch's documents, laid side by side as they come: now they are in the cache of the core.

    Args:
        count: most tiles that come.
        side: of a tile, pixels.
        block: shared memory for them, where there is some.
    """

    def __init__(self, count: int, side: int, block: Block | None = None) -> None:
        shape = (count, 3, side, side)
        self._all = torch.empty(shape, dtype=torch.uint8) if block is None else block.tensor(shape)
        self._array = self._all.numpy()
        self._end = 0

    def add(self, document: Encoded) -> Encoded:
        """The document, whose tiles are now those here."""
        begin, self._end = self._end, self._end + len(document.tiles)
        place = self._array[begin : self._end]
        place[...] = document.tiles
        return Encoded(document.input_ids, document.labels, place, document.visual_positions)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [K, 3, S, S] of the tiles that came."""
        return self._all[: self._end]


def collate(
    documents: Sequence[Encoded],
    keys: Sequence[str],
    *,
    step: int,
    epoch: int,
    sources: Sequence[int] | None = None,
    stack: TileStack | None = None,
) -> MicroBatch:
    """Documents, in order, as a micro-batch.

    Args:
        sources: number of each document's source; None: they all come from source 0.
        stack: where their tiles were laid already.
    """
    lengths = [len(document.input_ids) for document in documents]
    if documents:
        input_ids = np.concatenate([document.input_ids for document in documents])
        labels = np.concatenate([document.labels for document in documents])
    else:
        lengths, input_ids, labels = [1], np.zeros(1, dtype=np.int64), np.full(1, IGNORE_INDEX, dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    numbers = np.asarray(sources or [0] * len(lengths), dtype=np.int64)
    is_target = labels != IGNORE_INDEX
    is_target[starts] = False
    places = np.flatnonzero(is_target)
    visual = [document.visual_positions + start for document, start in zip(documents, starts, strict=False)]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64, copy=False))[None],
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(starts, lengths))[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=max(lengths),
        tiles=stack.tensor if stack is not None and documents else _tiles(documents),
        visual_positions=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *visual])),
        target_positions=torch.from_numpy(places - 1),
        targets=torch.from_numpy(labels[places].astype(np.int64, copy=False)),
        target_sources=torch.from_numpy(np.repeat(numbers, lengths)[places]),
        document_sources=torch.from_numpy(numbers),
        keys=list(keys),
        num_samples=len(documents),
        step=step,
        epoch=epoch,
    )


def _tiles(documents: Sequence[Encoded]) -> torch.Tensor:
    """uint8 [K, 3, S, S] of all documents' tiles."""
    count = sum(len(document.tiles) for document in documents)
    stack = TileStack(count, documents[0].tiles.shape[-1] if documents else 0)
    for document in documents:
        stack.add(document)
    return stack.tensor

"""A global batch of packs, and how ranks, accumulation steps and micro-batches share it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError


@dataclass(frozen=True)
class Packs:
    """Packs as flat arrays: documents of pack p are [offsets[p], offsets[p + 1]).

    `source` int64 [D] numbers the mixture's sources, `index` int64 [D] their samples; `tokens`, `tiles` int64 [D];
    `offsets` int64 [packs + 1].
    """

    source: np.ndarray
    index: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, packs: np.ndarray) -> Packs:
        """These packs, in this order; numbers from len(self) on are empty packs."""
        ends = np.concatenate(
            [self.offsets, np.full(max(int(packs.max(initial=-1)) + 1 - len(self), 0), self.offsets[-1])]
        )
        starts, sizes = ends[packs], np.diff(ends)[packs]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        docs = np.repeat(starts - offsets[:-1], sizes) + np.arange(int(offsets[-1]))
        return Packs(self.source[docs], self.index[docs], self.tokens[docs], self.tiles[docs], offsets)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, tiles) of each pack, int64 [packs]."""
        running = (np.concatenate([[0], np.cumsum(each)]) for each in (self.tokens, self.tiles))
        tokens, tiles = (np.diff(each[self.offsets]) for each in running)
        return tokens, tiles

    @staticmethod
    def join(parts: list[Packs]) -> Packs:
        """All packs of `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        offsets, base = [np.zeros(1, dtype=np.int64)], 0
        for part in parts:
            offsets.append(part.offsets[1:] - part.offsets[0] + base)
            base += int(part.offsets[-1] - part.offsets[0])
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("source", "index", "tokens", "tiles")
        }
        return Packs(**columns, offsets=np.concatenate(offsets))


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks train on in one step: packs in descending order of (tiles, tokens), empty ones last."""

    step: int
    epoch: int
    packs: Packs

    def micro_batches(self, world_size: int, micro_batch_packs: int) -> np.ndarray:
        """Pack numbers int64 [accumulation steps, ranks, packs].

        Micro-step m takes the next ranks x packs of the sorted packs and deals them over the ranks in snake order.
        Neighbours have about as many tiles, so the ranks' vision work at any moment is balanced. Raises DataError when
        the sizes do not divide.
        """
        accumulation = accumulation_steps(len(self.packs), world_size, micro_batch_packs)
        dealt = np.arange(len(self.packs)).reshape(accumulation, micro_batch_packs, world_size)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1]
        return dealt.transpose(0, 2, 1)


def accumulation_steps(global_batch_packs: int, world_size: int, micro_batch_packs: int) -> int:
    """Micro-batches per rank and optimizer step. Raises DataError naming values that fit when they do not divide."""
    per_micro_step = world_size * micro_batch_packs
    if per_micro_step < 1:
        raise DataError(f"{world_size} ranks with micro_batch_packs {micro_batch_packs}: both are at least 1")
    steps, rest = divmod(global_batch_packs, per_micro_step)
    if rest == 0:
        return steps
    fits = sorted({max(1, steps) * per_micro_step, (steps + 1) * per_micro_step})
    micro_batches = global_batch_packs // micro_batch_packs
    ranks = max(n for n in range(1, world_size + 1) if micro_batches % n == 0)
    per_rank = 0 if global_batch_packs % world_size else global_batch_packs // world_size
    smaller = [str(n) for n in range(1, per_rank + 1) if per_rank % n == 0]
    raise DataError(
        f"global_batch_packs is {global_batch_packs}, which {world_size} ranks with micro_batch_packs "
        f"{micro_batch_packs} cannot share evenly; set it to {' or '.join(map(str, fits))}, "
        + (f"or micro_batch_packs to {', '.join(smaller)}, " if smaller else "")
        + f"or use {ranks} ranks"
    )

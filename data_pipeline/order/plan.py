"""The training order as a pure function of sources and settings: steps known before the first, resume is a position.

Only numpy and the standard library: `alignvlm data plan` and a cluster's login node can run it. Reading samples is the
loader's business. docs/data_order.md explains the method. A change that alters the order raises PLAN_VERSION.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.checksums import digest
from data_pipeline.errors import DataError
from data_pipeline.order.batch import GlobalBatch, Packs
from data_pipeline.order.hashing import hash_key, permutation
from data_pipeline.order.mixing import block_quotas, block_slots, epoch_draws
from data_pipeline.order.packing import count_packs, pack_lengths
from data_pipeline.order.settings import PlanSettings
from data_pipeline.order.shuffle import PlanSource, SourceOrder
from data_pipeline.order.window_counts import WindowCounts

PLAN_VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where step `step` begins: pack `pack` of pack window `window` of epoch `epoch`. The same on all ranks."""

    fingerprint: str
    version: int
    seed: int
    epoch: int
    window: int
    pack: int
    step: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Raises DataError when the text is no position."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise DataError(f"not a position of a plan: {text[:80]!r}") from error


class Plan:
    """Global batches of packs, step by step.

    Args:
        sources: name -> sample lengths and shards of it (`sources.open_source`); only those of the mixture are used.
        mixture: source name -> weight.
        cache: folder for the numbers of packs per window, so that steps are counted once for all processes and runs.

    Raises:
        DataError: a mixture that cannot work, or a source without usable samples.
    """

    def __init__(
        self,
        sources: Mapping[str, PlanSource],
        mixture: Mapping[str, float],
        settings: PlanSettings,
        *,
        cache: Path | None = None,
    ) -> None:
        self.settings = settings
        self.names = list(mixture)
        self.mixture = {name: float(weight) for name, weight in mixture.items()}
        self.sources = {name: sources[name] for name in self.names if name in sources}
        self.orders = {name: SourceOrder(name, source, settings) for name, source in self.sources.items()}
        for name, order in self.orders.items():
            if not order.num_usable:
                raise DataError(
                    f"source {name!r} has no usable sample: {order.num_unselected} are not selected by its filter or "
                    f"share, {order.num_too_long} are longer than {settings.sequence_length} tokens, "
                    f"{order.num_unmeasured} cannot be used"
                )
        self.draws = epoch_draws({name: order.num_usable for name, order in self.orders.items()}, self.mixture)
        self.samples_per_epoch = sum(self.draws.values())
        self.num_windows = -(-self.samples_per_epoch // settings.pack_window)
        self._quotas = block_quotas(np.asarray(list(self.draws.values()), dtype=np.int64), settings.mix_block)
        self._window = lru_cache(maxsize=2)(self._make_window)
        self.counts = WindowCounts(self.num_windows, self._measure_window, self.fingerprint, cache)
        for name, order in self.orders.items():
            if order.num_too_long or order.num_unmeasured:
                log.warning(
                    "source %s: %d samples longer than %d tokens and %d unusable ones are left out (%d remain)",
                    name, order.num_too_long, settings.sequence_length, order.num_unmeasured, order.num_usable,
                )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything that decides the order; not of how long it is followed (epochs, max_steps)."""
        state = {
            "version": PLAN_VERSION,
            "seed": self.settings.seed,
            "sources": {name: [self.draws[name], self.sources[name].fingerprint] for name in self.names},
        }
        state |= self.settings.order()  # JSON keeps the keys' order: seed stays the second
        return digest(state)

    @property
    def num_steps(self) -> int:
        """Exact number of optimizer steps."""
        steps = 0
        for epoch in range(self.settings.epochs):
            left = None if self.settings.max_steps is None else self.settings.max_steps - steps
            if left is not None and self.counts.at_least(epoch, left * self.settings.global_batch_packs):
                return steps + left
            steps += self._steps(epoch)
        return steps

    def position(self, step: int) -> Position:
        """Where step `step` (from 0) begins; `num_steps` is the end. Raises DataError outside the plan."""
        if step < 0 or (self.settings.max_steps is not None and step > self.settings.max_steps):
            raise DataError(f"step {step} is outside the plan of {self.num_steps} steps")
        first = 0  # step of the epoch's start
        for epoch in range(self.settings.epochs):
            pack = (step - first) * self.settings.global_batch_packs
            if self.counts.at_least(epoch, pack + 1):
                window, inside = self.counts.locate(epoch, pack)
                return self._position(epoch, window, inside, step)
            first += self._steps(epoch)
        if step != first:
            raise DataError(f"step {step} is outside the plan of {first} steps")
        return self._position(self.settings.epochs, 0, 0, step)

    def check(self, position: Position) -> None:
        """Raises DataError when a position belongs to another plan."""
        seed = self.settings.seed
        if (position.fingerprint, position.version, position.seed) != (self.fingerprint, PLAN_VERSION, seed):
            raise DataError(
                f"the position of step {position.step} belongs to plan {position.fingerprint} "
                f"(version {position.version}, seed {position.seed}), this plan is {self.fingerprint} "
                f"(version {PLAN_VERSION}, seed {seed}): data or settings changed; `alignvlm data diff` shows how"
            )

    def batches(self, start: Position | int = 0) -> Iterator[GlobalBatch]:
        """Global batches from a position (or step number) to the end of the plan."""
        position = start if isinstance(start, Position) else self.position(start)
        self.check(position)
        epoch, window, pack, step = position.epoch, position.window, position.pack, position.step
        while epoch < self.settings.epochs and (self.settings.max_steps is None or step < self.settings.max_steps):
            parts, missing = [], self.settings.global_batch_packs
            while missing and window < self.num_windows:
                packs = self._window(epoch, window)
                taken = packs.take(np.arange(pack, min(pack + missing, len(packs))))
                parts.append(taken)
                missing -= len(taken)
                pack += len(taken)
                if pack >= len(packs):
                    window, pack = window + 1, 0
            yield GlobalBatch(step, epoch, self._sorted(Packs.join(parts)))
            step += 1
            if window == self.num_windows:
                epoch, window, pack = epoch + 1, 0, 0

    def windows_from(self, epoch: int, window: int, count: int) -> list[tuple[int, int]]:
        """A pack window and those behind it that the plan reads, (epoch, window), at most `count`."""
        end = self._end
        found: list[tuple[int, int]] = []
        while len(found) < count and (epoch, window, 0) < (end.epoch, end.window, end.pack):
            found.append((epoch, window))
            epoch, window = (epoch, window + 1) if window + 1 < self.num_windows else (epoch + 1, 0)
        return found

    def window_shards(self, epoch: int, window: int) -> dict[str, np.ndarray]:
        """Source -> int64 numbers of the shards that hold a pack window's samples, ascending."""
        source, index = self._window_samples(epoch, window)
        return {
            name: np.unique(np.searchsorted(self.orders[name].starts, index[source == number], side="right") - 1)
            for number, name in enumerate(self.names)
        }

    def num_samples(self, name: str) -> int:
        """Samples of a source that the plan reads, repeated ones included; an estimate where `max_steps` ends it."""
        samples = self.draws[name] * self.settings.epochs
        if self.settings.max_steps is None:
            return samples
        per_pack = min(self.settings.pack_window, self.samples_per_epoch) / max(len(self._window(0, 0)), 1)
        share = self.draws[name] / self.samples_per_epoch
        return min(samples, round(self.settings.max_steps * self.settings.global_batch_packs * per_pack * share))

    @cached_property
    def _end(self) -> Position:
        return self.position(self.num_steps)

    def _sorted(self, packs: Packs) -> Packs:
        """Packs in descending order of (tiles, tokens), filled up with empty ones."""
        tokens, tiles = packs.totals()
        order = np.lexsort((-tokens, -tiles))
        return packs.take(np.concatenate([order, np.arange(len(packs), self.settings.global_batch_packs)]))

    def _make_window(self, epoch: int, window: int) -> Packs:
        source, index = self._window_samples(epoch, window)
        tokens, tiles = self._window_measures(source, index)
        pack_of, num_packs = pack_lengths(tokens, self.settings.sequence_length)
        place = np.empty(num_packs, dtype=np.int64)
        place[permutation(hash_key(self.settings.seed, "packs", epoch, window), num_packs)] = np.arange(num_packs)
        pack_of = place[pack_of]
        docs = np.argsort(pack_of, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
        return Packs(source[docs], index[docs], tokens[docs], tiles[docs], offsets)

    def _window_samples(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number, sample number) of the window's samples, in the order of the mixture."""
        begin = window * self.settings.pack_window
        end = min(begin + self.settings.pack_window, self.samples_per_epoch)
        first, last = begin // self.settings.mix_block, -(-end // self.settings.mix_block)
        slots = block_slots(self._quotas, first, last, self.settings.seed, epoch)
        index = np.empty(len(slots), dtype=np.int64)
        for number, name in enumerate(self.names):
            base = epoch * self.draws[name]
            low, high = self._quotas[first, number], self._quotas[last, number]
            index[slots == number] = self.orders[name].ids(base + int(low), base + int(high))
        inside = slice(begin - first * self.settings.mix_block, end - first * self.settings.mix_block)
        return slots[inside], index[inside]

    def _window_measures(self, source: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        measures = np.empty((len(index), 2), dtype=np.int64)
        for number, name in enumerate(self.names):
            mine = source == number
            measures[mine] = self.sources[name].measures[index[mine]]
        return measures[:, 0], measures[:, 1]

    def _measure_window(self, epoch: int, window: int) -> tuple[int, int, int]:
        """(packs, tokens, tiles) of a window."""
        tokens, tiles = self._window_measures(*self._window_samples(epoch, window))
        return count_packs(tokens, self.settings.sequence_length), int(tokens.sum()), int(tiles.sum())

    def _steps(self, epoch: int) -> int:
        return -(-self.counts.packs(epoch) // self.settings.global_batch_packs)

    def _position(self, epoch: int, window: int, pack: int, step: int) -> Position:
        return Position(self.fingerprint, PLAN_VERSION, self.settings.seed, epoch, window, pack, step)

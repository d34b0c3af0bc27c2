"""Packs, tokens and tiles per pack window of each epoch: counted when first asked for, kept in a cache folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.files import load_array, read_or_make, reason, save_array

log = logging.getLogger(__name__)
_SAVE_FROM = 8
"""Epochs of fewer windows are counted again faster than their file is found."""


class WindowCounts:
    """Numbers of the windows of every epoch, counted from the front as far as needed.

    Args:
        num_windows: windows of an epoch.
        measure: (epoch, window) -> (packs, tokens, tiles).
        fingerprint: of the plan, part of the cache's file names.
        cache: folder of the files; null keeps nothing.
    """

    def __init__(
        self,
        num_windows: int,
        measure: Callable[[int, int], tuple[int, int, int]],
        fingerprint: str,
        cache: Path | None,
    ) -> None:
        self.num_windows, self._measure = num_windows, measure
        self._fingerprint, self._cache = fingerprint, cache
        self._rows: dict[int, list[tuple[int, int, int]]] = {}
        self._packs: dict[int, list[int]] = {}  # epoch -> packs before each counted window, and after the last

    def at_least(self, epoch: int, packs: int) -> bool:
        """Whether the epoch has so many packs; counts only as far as it takes to know."""
        before = self._load(epoch)
        while before[-1] < packs and len(before) <= self.num_windows:
            row = self._measure(epoch, len(before) - 1)
            self._rows[epoch].append(row)
            before.append(before[-1] + row[0])
            if len(before) > self.num_windows:
                self._save(epoch)
        return before[-1] >= packs

    def packs(self, epoch: int) -> int:
        """Packs of the whole epoch."""
        self.at_least(epoch, 1 << 62)
        return self._packs[epoch][-1]

    def totals(self, epoch: int) -> tuple[int, int, int]:
        """(packs, tokens, tiles) of the whole epoch."""
        self.packs(epoch)
        packs, tokens, tiles = (sum(column) for column in zip(*self._rows[epoch], strict=True))
        return packs, tokens, tiles

    def locate(self, epoch: int, pack: int) -> tuple[int, int]:
        """(window, pack inside it) of the epoch's pack number `pack`."""
        found = self.at_least(epoch, pack + 1)
        assert found, f"epoch {epoch} has no pack {pack}"
        before = self._packs[epoch]
        window = int(np.searchsorted(before, pack, side="right")) - 1
        return window, pack - before[window]

    def _path(self, epoch: int) -> Path | None:
        return None if self._cache is None else self._cache / f"windows-{self._fingerprint}-{epoch}.npy"

    def _load(self, epoch: int) -> list[int]:
        if epoch not in self._packs:
            path = self._path(epoch)
            rows: list[tuple[int, int, int]] = []
            if path is not None:
                rows = read_or_make(path, self._read, lambda: [])
            self._rows[epoch] = rows
            self._packs[epoch] = np.concatenate([[0], np.cumsum([row[0] for row in rows], dtype=np.int64)]).tolist()
        return self._packs[epoch]

    def _read(self, path: Path) -> list[tuple[int, int, int]]:
        return [tuple(row) for row in load_array(path, np.int64, (self.num_windows, 3)).tolist()]

    def _save(self, epoch: int) -> None:
        path = self._path(epoch)
        if path is None or self.num_windows < _SAVE_FROM:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_array(path, np.asarray(self._rows[epoch], dtype=np.int64))
        except OSError as error:  # the next start counts again
            log.warning("%s cannot be written (%s)", path, reason(error))

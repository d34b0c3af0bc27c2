"""How long each rank computes, waits for others and waits for its data; which one is far slower than the others.

The numbers ride in the sum that every step makes anyway, once per tracking interval: no collective, and no look at the
device, is added. They are those of the steps since the last time.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

from torch.distributed import Work

from alignvlm.progress import say
from alignvlm.system.monitor.heart import Heart
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch

WINDOW = 300.0
"""Seconds over which ranks are compared."""
SLOW = 1 / 0.7
"""A rank whose own time is above this many medians is a straggler."""


class Share(NamedTuple):
    """What a rank tells about its steps since the last time; seconds and counts in all of them."""

    compute: float = 0.0
    """Seconds of the steps in which it neither waited for other ranks nor for its data."""
    wait: float = 0.0
    """Seconds in which its host stood in collectives. On a GPU those of NCCL run on the device and are in `compute`."""
    data: float = 0.0
    """Seconds of waiting for its loader processes."""
    tiles: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0

    def plus(self, other: Share) -> Share:
        return Share(*map(sum, zip(self, other, strict=True)))

    @property
    def own(self) -> float:
        """Seconds in which others may have waited for it."""
        return self.compute + self.data


class RankTimes(Callback):
    """Adds `ranks` and `stragglers` to the record once per tracking interval; rank 0 warns of a new straggler."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._waited_before = 0.0
        self._mine = Share()
        self._nodes: list[str] = []
        self._window: deque[tuple[float, list[Share]]] = deque()
        self._named: set[int] = set()
        self._open = ExitStack()

    def on_start(self, state: StageState) -> None:
        if state.world.size > 1:
            self._mine, self._named = Share(), set()
            self._window.clear()
            self._nodes = state.world.all_gather(socket.gethostname())
            self._open.enter_context(self._timed_waits(state.world.heart))

    def on_end(self, state: StageState) -> None:
        self._open.close()

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        state.shared = []
        if state.world.size == 1:
            return
        if (state.step + 1) % state.recipe.tracking.interval == 0:
            rank, size = state.world.rank, state.world.size
            state.shared = [value if rank == each else 0.0 for each in range(size) for value in self._mine]
            self._mine = Share()
        filled = [b for b in batches if b.num_samples]
        tiles, tokens = sum(len(b.tiles) for b in filled), sum(b.input_ids.numel() for b in filled)
        self._mine = self._mine.plus(Share(tiles=tiles, tokens=tokens, steps=1))
        self._waited_before = self._waited

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if state.world.size == 1:
            return
        waited = self._waited - self._waited_before
        compute = record.seconds - record.data_wait - waited
        self._mine = self._mine.plus(Share(compute=compute, wait=waited, data=record.data_wait))
        width = len(Share())
        shares = [Share(*state.shared[i : i + width]) for i in range(0, len(state.shared), width)]
        if shares and shares[0].steps:
            record.ranks = summary(shares)
            self._window.append((record.time, shares))
            self._find_stragglers(state, record)

    def _find_stragglers(self, state: StageState, record: StepRecord) -> None:
        """Compare the ranks' own times over the window, once it is full."""
        window = self._window
        while len(window) > 1 and window[1][0] <= record.time - WINDOW:
            window.popleft()
        if window[0][0] > record.time - WINDOW:
            return
        totals = [Share() for _ in self._nodes]
        for _, shares in islice(window, 1, None):
            totals = [total.plus(share) for total, share in zip(totals, shares, strict=True)]
        slow = stragglers(totals)
        record.stragglers = [f"rank {rank} on {self._nodes[rank]}" for rank in slow]
        for rank in sorted(slow - self._named):
            if state.world.is_main:
                say(f"WARNING: {describe(rank, self._nodes[rank], totals)}")
        self._named = slow

    @contextmanager
    def _timed_waits(self, heart: Heart) -> Iterator[None]:
        """Every wait for a collective, of DeepSpeed, of PyTorch or of ours, passes through `Work.wait`."""
        wait = Work.wait

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                with heart.waiting():  # the rank that does not wait is the one that the others wait for
                    return wait(work, *args, **kwargs)
            finally:
                self._waited += time.perf_counter() - began

        Work.wait = timed  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Work.wait = wait  # type: ignore[method-assign]


def summary(shares: Sequence[Share]) -> dict[str, dict[str, float]]:
    """Times, tiles and tokens per step: mean and maximum over the ranks, and which rank has the maximum."""
    found = {}
    for name in ("compute", "wait", "data", "tiles", "tokens"):
        values = [getattr(share, name) / share.steps for share in shares]
        largest = max(values)
        found[name] = {"mean": sum(values) / len(values), "max": largest, "rank": values.index(largest)}
    return found


def stragglers(totals: Sequence[Share]) -> set[int]:
    """Ranks whose own time is above `SLOW` medians of all ranks."""
    usual = median(share.own for share in totals)
    return {rank for rank, share in enumerate(totals) if share.own > SLOW * usual}


def describe(rank: int, node: str, totals: Sequence[Share]) -> str:
    """The warning about a straggler: its times and its work beside the usual ones tell a slow GPU from uneven data."""
    share, steps = totals[rank], totals[rank].steps
    usual = Share(*(median(values) for values in zip(*totals, strict=True)))
    return (
        f"rank {rank} on {node} is slow: {share.own / steps:.3g} s per step of its own, median {usual.own / steps:.3g} "
        f"s ({share.data / steps:.2g} s of it waiting for data, median {usual.data / steps:.2g}), with "
        f"{share.tiles / steps:,.0f} tiles and {share.tokens / steps:,.0f} tokens, "
        f"median {usual.tiles / steps:,.0f} and {usual.tokens / steps:,.0f}"
    )

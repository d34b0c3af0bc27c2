"""Times of the ranks in the sum of every step: what is shared, what the record says, who is named a straggler."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Work

from alignvlm.config.schema import Recipe
from alignvlm.training.callbacks import StageState
from alignvlm.training.callbacks.rank_times import RankTimes, Share, summary
from alignvlm.training.record import StepRecord
from tests.training.fakes import FakeWorld, micro_batch, record, stage_state


class Nodes(FakeWorld):
    def all_gather(self, value: Any) -> list[Any]:
        return [value, *(f"node{rank}" for rank in range(1, self.size))]


def start(recipe: Recipe, folder: Path, size: int = 2) -> tuple[StageState, RankTimes]:
    state, callback = stage_state(recipe, folder, world=Nodes(size=size)), RankTimes()
    callback.on_start(state)
    return state, callback


def take(state: StageState, callback: RankTimes, others: list[Share], at: float, **changes: Any) -> StepRecord:
    """A step of two micro-batches of rank 0, in which the other ranks add what they share."""
    callback.before_step(state, [micro_batch([3, 5], tiles=2), micro_batch([])])
    if state.shared:
        width = len(Share())
        assert state.shared[width:] == [0.0] * width * len(others)
        state.shared = [*state.shared[:width], *(value for other in others for value in other)]
    state.step += 1
    step = replace(record(state.step), time=at, **changes)
    callback.on_step(state, step)
    return step


def test_the_record_has_the_times_of_all_ranks_once_per_interval(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = start(recipe, tmp_path)
    other = Share(compute=3.0, wait=0.5, data=0.5, tiles=6, tokens=12, steps=1)
    steps = [take(state, callback, [other], 0.0, seconds=2.0, data_wait=0.25) for _ in range(4)]
    callback.on_end(state)
    assert [bool(step.ranks) for step in steps] == [False, True, False, True]  # the interval is 2
    assert steps[1].ranks == {
        "compute": {"mean": (1.75 + 3.0) / 2, "max": 3.0, "rank": 1},
        "wait": {"mean": 0.25, "max": 0.5, "rank": 1},
        "data": {"mean": 0.375, "max": 0.5, "rank": 1},
        "tiles": {"mean": 4.0, "max": 6.0, "rank": 1},
        "tokens": {"mean": 10.0, "max": 12.0, "rank": 1},
    }
    mine = summary([Share(3.5, 0.0, 0.5, 4, 16, 2), other])
    assert steps[3].ranks == mine


def test_waiting_for_a_collective_is_no_computing(recipe: Recipe, tmp_path: Path, tmp_path_factory: Any) -> None:
    """A real collective, whose other rank comes late."""
    before = Work.wait
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    group = torch.distributed.ProcessGroupGloo(store, 0, 1)
    state, callback = start(recipe, tmp_path)
    callback.before_step(state, [micro_batch([4])])
    began = time.perf_counter()
    group.allreduce(torch.ones(1)).wait()
    waited = time.perf_counter() - began
    step = replace(record(1), seconds=1.0, data_wait=0.25)
    callback.on_step(state, step)
    state.step = 1
    callback.before_step(state, [])
    share = Share(*state.shared[: len(Share())])
    assert 0 < share.wait <= waited
    assert share.compute == pytest.approx(0.75 - share.wait)
    callback.on_end(state)
    assert Work.wait is before


def test_a_straggler_is_named_once_with_its_node_and_its_work(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, callback = start(recipe, tmp_path, size=4)
    slow, usual = Share(30, 0, 2, 20, 80, 10), Share(20, 10, 1, 20, 80, 10)
    named = []
    for number in range(20):
        third = slow if number < 14 else usual
        named.append(take(state, callback, [usual, third, usual], 100.0 * number / 2, seconds=2.0).stragglers)
    callback.on_end(state)
    assert named[1] == named[5] == []  # 300 s are not over
    assert named[9] == named[13] == ["rank 2 on node2"]
    assert named[19] == []  # within 300 s of its last slow step it is no longer 1/0.7 of the median
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1
    assert (
        "rank 2 on node2 is slow: 3.2 s per step of its own, median 2.1 s (0.2 s of it waiting for data, median 0.1), "
        "with 2 tiles and 8 tokens, median 2 and 8" in said
    )


def test_a_lone_rank_shares_nothing(recipe: Recipe, tmp_path: Path) -> None:
    before = Work.wait
    state, callback = start(recipe, tmp_path, size=1)
    assert Work.wait is before
    steps = [take(state, callback, [], 0.0) for _ in range(2)]
    assert [(step.ranks, step.stragglers, state.shared) for step in steps] == [({}, [], [])] * 2

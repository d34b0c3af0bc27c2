"""The watchdog: how long a step may take, whom the heartbeats blame, what a rank says when nobody answers."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from alignvlm.config.schema import Recipe
from alignvlm.training.callbacks import StageState, watchdog
from alignvlm.training.callbacks.watchdog import HANG, Heartbeats, Watchdog, describe_alone, describe_lag
from tests.training.fakes import FakeWorld, micro_batch, record, stage_state


def beat(rank: int, step: int, phase: str = "in a step", keys: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"rank": rank, "host": f"node{rank}", "step": step, "phase": phase, "keys": list(keys)}


def test_ranks_that_made_fewer_steps_are_behind() -> None:
    text = describe_lag([beat(0, 12), beat(1, 11, keys=("fields/0.tar/7",)), beat(2, 12)])
    assert text == "  lagging: rank 1 on node1, in a step 12, samples fields/0.tar/7"


def test_a_rank_that_still_waits_for_data_is_behind_those_in_the_step() -> None:
    text = describe_lag([beat(0, 11), beat(1, 11, "between steps")])
    assert text == "  lagging: rank 1 on node1, between steps 12, samples no samples yet (waiting for data)"


@pytest.mark.parametrize("phase", ["in a step", "between steps"])
def test_when_no_rank_is_behind_all_are_named(phase: str) -> None:
    first, *ranks = describe_lag([beat(0, 5, phase), beat(1, 5, phase)]).splitlines()
    assert first.startswith("all ranks are in the same step")
    assert [line.split(" on ")[0] for line in ranks] == ["  lagging: rank 0", "  lagging: rank 1"]


def test_the_limit_follows_the_usual_step_and_has_a_floor(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = stage_state(recipe, tmp_path), Watchdog()
    assert callback.limit(state) == 60 * recipe.resilience.watchdog_minutes
    callback._durations.extend([1.0, 100.0, 1000.0])
    assert callback.limit(state) == recipe.resilience.watchdog_factor * 100.0


class OverTcp(FakeWorld):
    """Ranks of one process that share the store which the real `World.open_store` would give them."""

    server: Any = None

    def open_store(self, timeout: timedelta) -> Any:
        if OverTcp.server is None:
            OverTcp.server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            store = OverTcp.server
        else:
            store = torch.distributed.TCPStore("127.0.0.1", OverTcp.server.port, is_master=False)
        store.set_timeout(timeout)
        return store


def test_every_rank_reads_all_heartbeats_until_rank_0_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OverTcp, "server", None)
    ranks = [Heartbeats(OverTcp(size=3, rank=rank), beat(rank, 1)) for rank in range(3)]
    ranks[2].post(beat(2, 8, keys=("fields/0.tar/1",)))
    expected = [beat(0, 1), beat(1, 1), beat(2, 8, keys=("fields/0.tar/1",))]
    assert [rank.read() for rank in ranks] == [expected] * 3
    other = ranks[1]
    ranks.clear()
    OverTcp.server = None  # the process of rank 0 ends
    for step in (2, 3):
        other.post(beat(1, step))
    assert other.read() is None


def test_a_frozen_rank_0_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(torch.distributed.HashStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            time.sleep(5)
            return []

    monkeypatch.setattr(watchdog, "STORE_SECONDS", 0.05)
    monkeypatch.setattr(FakeWorld, "open_store", lambda self, timeout: Frozen())
    began = time.monotonic()
    assert Heartbeats(FakeWorld(), beat(0, 1)).read() is None
    assert time.monotonic() - began < 2
    assert "rank 0 does not answer" in describe_alone(beat(3, 7))
    assert "rank 3 on node3, in a step 8" in describe_alone(beat(3, 7))


def record_exit(callback: Watchdog, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], threading.Event]:
    """Let the watchdog look often, and end itself instead of the process: its exit codes, and when there is one."""
    codes: list[int] = []
    ended = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        callback._done.set()
        ended.set()

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.02)
    return codes, ended


def start_a_step(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> tuple[StageState, Watchdog, list[int], threading.Event]:
    """A watchdog with this limit, once the step after the sixth has begun, and what `record_exit` gives."""
    impatient = replace(recipe, resilience=replace(recipe.resilience, watchdog_minutes=seconds / 60))
    state, callback = stage_state(impatient, folder, step=6), Watchdog()
    codes, ended = record_exit(callback, monkeypatch)
    callback.on_start(state)
    callback.before_step(state, [micro_batch([3, 4])])
    return state, callback, codes, ended


def test_a_step_without_end_is_reported_and_ends_the_process(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    state, callback, codes, ended = start_a_step(recipe, tmp_path, monkeypatch, seconds=0.05)
    assert ended.wait(10)
    assert codes == [HANG]
    report = capfd.readouterr().err
    assert "rank 0: step 7 of stage connector has taken" in report
    assert "samples s/0.tar/0, s/0.tar/1" in report
    assert "test_watchdog.py" in report  # the stack of this thread
    callback.on_end(state)


def test_a_save_may_take_long_while_it_writes_and_no_longer(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    state, callback, codes, ended = start_a_step(recipe, tmp_path, monkeypatch, seconds=0.2)
    store: Any = state.store
    callback.on_step(state, record())
    for saved in range(12):  # six times the limit
        store.progress = saved
        assert not ended.wait(0.1)
    assert ended.wait(10)
    assert codes == [HANG]
    report = capfd.readouterr().err
    assert "rank 0: the save after step 6 of stage connector has taken" in report
    assert "none of them writes\n  lagging: rank 0 on " in report
    assert "the save after step 6, 11 bytes so far" in report
    callback.on_end(state)


def test_a_held_out_loss_may_take_long_while_it_makes_passes_and_no_longer(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, callback, codes, ended = start_a_step(recipe, tmp_path, monkeypatch, seconds=0.4)
    for _ in range(10):  # more than twice the limit
        state.validated += 1
        assert not ended.wait(0.1)
    assert ended.wait(10)
    assert codes == [HANG]
    callback.on_end(state)


def test_a_rank_that_waits_for_the_save_of_another_goes_on_waiting() -> None:
    callback = Watchdog()
    beats = [{**beat(0, 6), "saved": 700}, {**beat(1, 6), "saved": 20}]
    store: Any = type("Store", (), {"read": lambda self: beats})()
    assert callback._save_goes_on(beats[0], store)
    assert not callback._save_goes_on(beats[0], store)
    beats[1]["saved"] += 1
    assert callback._save_goes_on(beats[0], store)
    assert not callback._save_goes_on(beat(0, 6), store)


def test_a_report_that_cannot_be_printed_keeps_no_job_alive(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.0)
    state, callback = stage_state(recipe, tmp_path, step=6), Watchdog()
    callback.before_step(state, [])
    with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", full)
        with pytest.raises(OSError, match="No space left"):
            callback._give_up(state, Heartbeats(state.world, beat(0, 6)), 3.0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert codes == [HANG]


def test_the_thread_ends_with_the_stage(recipe: Recipe, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    state, callback = stage_state(recipe, tmp_path), Watchdog()
    callback.on_start(state)
    assert set(threading.enumerate()) > before
    callback.before_step(state, [])
    callback.on_step(state, record())
    callback.on_end(state)
    assert set(threading.enumerate()) == before
    Watchdog().on_end(state)  # an error before the start

"""Monitors that talk to each other: whom they blame, and how a rank that waits knows that others still work."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import pytest

from alignvlm.system.monitor import peers as module
from alignvlm.system.monitor.heart import SIZE, Heart, Limit, Pulse
from alignvlm.system.monitor.peers import Peers, lagging
from alignvlm.system.monitor.watch import Watch


def state(rank: int, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank, "host": f"node{rank}", "section": "steps", "text": "step 12", "age": 9.0, "silent": 0.0,
        "waiting": False, "state": "S", "traced": False,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("states", "blamed"),
    [
        ([state(0, waiting=True), state(1), state(2, waiting=True)], [1]),
        ([state(0, waiting=True), state(1), state(2, waiting=True, state="T")], [2]),
        ([state(0, silent=40.0, waiting=True), state(1, state="T"), state(2)], [0]),
        ([state(0), state(1)], [0, 1]),
        ([state(0, waiting=True), state(1, waiting=True)], [0, 1]),
    ],
    ids=["one does not wait", "one is stopped", "one is silent", "all compute", "all wait"],
)
def test_who_is_blamed(states: list[dict[str, Any]], blamed: list[int]) -> None:
    lines = lagging(states).splitlines()
    named = [line for line in lines if line.startswith("  lagging: ")]
    assert [int(line.split()[2]) for line in named] == blamed
    assert (len(named) < len(lines)) == (len(blamed) == len(states))
    assert all(
        f" on node{rank}, in steps, step 12: 9 s without progress" in line
        for rank, line in zip(blamed, named, strict=True)
    )


def test_what_is_odd_about_a_rank_is_said_and_many_are_counted() -> None:
    assert lagging([state(0, waiting=True), state(1, silent=31.0, state="T")]).endswith(
        "9 s without progress, its process is stopped (SIGSTOP, Ctrl-Z), no word from its host for 31 s"
    )
    assert lagging([state(rank) for rank in range(40)]).endswith("\n  … and 24 more")


class Rank:
    """A rank's heart and what its monitor makes of it."""

    def __init__(self, rank: int, size: int) -> None:
        file = os.memfd_create("heart")
        os.ftruncate(file, SIZE)
        self.socket = module.bound("127.0.0.1") if rank == 0 else None
        port = self.socket.getsockname()[1] if self.socket else 0
        self.heart, self.pulse = Heart({"evaluation": Limit(1.0, "")}, file, port=port), Pulse(file)
        os.close(file)
        self.rank, self.size = rank, size
        self.start_monitor()

    def start_monitor(self) -> None:
        """One, as a process of its own has it, in place of the one before."""
        listens = os.dup(self.socket.fileno()) if self.socket else -1
        self.peers = Peers(self.pulse, self.rank, self.size, listens)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """Three monitors that have met; a slow answer is waited for briefly."""
    monkeypatch.setattr(module, "ASK_SECONDS", 0.3)
    found = [Rank(rank, 3) for rank in range(3)]
    for rank in found:
        rank.heart.join("127.0.0.1", found[0].heart.port, "word")
    return found


def talk(ranks: list[Rank], *ages: float) -> None:
    """Each tells its age, the hub listens and answers."""
    for number in (1, 2):
        ranks[number].peers._sent = 0.0
        ranks[number].peers.exchange(state(number, age=ages[number]), 0.01)
    ranks[0].peers.exchange(state(0, age=ages[0]), 0.05)
    for number in (1, 2):
        ranks[number].peers.exchange(state(number, age=ages[number]), 0.02)


def test_all_know_when_any_of_them_last_made_progress(ranks: list[Rank]) -> None:
    assert ranks[1].peers.still is None
    talk(ranks, 70.0, 50.0, 60.0)
    talk(ranks, 71.0, 51.0, 61.0)
    for rank in ranks:
        assert 51 <= (rank.peers.still or 0.0) < 53
    before = ranks[1].peers.still
    time.sleep(0.05)
    assert ranks[1].peers.still >= before + 0.05  # also when rank 0 never answers again


def test_a_rank_hears_from_rank_0_who_is_behind_or_that_it_does_not_answer(ranks: list[Rank]) -> None:
    talk(ranks, 9.0, 9.0, 9.0)
    ranks[1].peers._send(ranks[1].pulse.hub, state(1, waiting=True, ask=True), 0.0)
    ranks[0].peers.exchange(state(0, waiting=True), 0.05)
    said = ranks[1].peers.lag(state(1, waiting=True))
    assert said.startswith("  lagging: rank 2 on node2")
    ranks[1].peers._lag = None
    ranks[0].peers._socket.close()
    assert ranks[1].peers.lag(state(1)).startswith("the monitor of rank 0 does not answer")


def test_all_know_of_a_rank_in_a_debugger_for_a_while(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    talk(ranks, 9.0, 9.0, 9.0)
    assert not any(rank.peers.is_traced for rank in ranks)
    ranks[1].peers._sent = 0.0
    ranks[1].peers.exchange(state(1, traced=True), 0.01)
    talk(ranks, 9.0, 9.0, 9.0)
    assert all(rank.peers.is_traced for rank in ranks)
    later = time.monotonic() + module.TRACED_SECONDS + 1
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    assert not any(rank.peers.is_traced for rank in ranks)


def test_another_monitor_of_rank_0_hears_what_was_said_while_there_was_none(ranks: list[Rank]) -> None:
    ranks[0].peers._socket.close()
    ranks[1].peers.exchange(state(1, age=40.0), 0.01)
    ranks[0].start_monitor()
    talk(ranks, 70.0, 50.0, 60.0)
    assert ranks[1].peers.still == pytest.approx(50, abs=1)


def test_strangers_and_garbage_change_nothing(ranks: list[Rank]) -> None:
    talk(ranks, 9.0, 9.0, 9.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect(("127.0.0.1", ranks[0].heart.port))
        for said in (b"", b"\xff", b"[]", b"{}", json.dumps({"token": "no", "state": state(7)}).encode()):
            stranger.send(said)
        for broken in ({}, {"rank": 1}, state(1, age="x"), 5, None):
            stranger.send(json.dumps({"token": "word", "state": broken}).encode())
    ranks[0].peers.exchange(state(0), 0.1)
    assert sorted(ranks[0].peers._heard) == [0, 1, 2]
    assert "rank 7" not in lagging(ranks[0].peers._states())
    talk(ranks, 9.0, 9.0, 9.0)


@pytest.mark.parametrize(
    ("section", "waiting", "age", "still", "hung"),
    [
        ("evaluation", False, 1.1, 0.0, True),
        ("evaluation", True, 9.0, 0.5, False),
        ("evaluation", True, 9.0, None, False),
        ("evaluation", True, 9.0, 1.4, True),
        ("steps", True, 9.0, 0.0, False),
    ],
    ids=["works no more", "waits for one that works", "knows nobody", "all stand still", "without a limit"],
)
def test_a_rank_that_waits_is_ended_only_when_none_makes_progress(
    monkeypatch: pytest.MonkeyPatch, section: str, waiting: bool, age: float, still: float | None, hung: bool
) -> None:
    file = os.memfd_create("heart")
    os.ftruncate(file, SIZE)
    heart = Heart({"evaluation": Limit(1.0, "")}, file)
    heart.enter(section)
    watch = Watch(os.getpid(), file, 1, 2, -1)
    os.close(file)
    watch._age = age
    monkeypatch.setattr(Peers, "still", still)
    if not waiting:
        assert watch._is_hung() is hung
        return
    with heart.waiting():
        assert watch._is_hung() is hung

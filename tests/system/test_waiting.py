"""Ranks wait for rank 0 however long it prepares, never for one that is gone, and never in the store of another job."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignvlm.errors import UserError
from alignvlm.launch.local import free_port
from alignvlm.system import waiting
from alignvlm.system.waiting import Waiting
from data_pipeline.errors import DataError
from tests.jobs import ROOT, job_environment

JOB = """
import os, sys, time
from datetime import timedelta
import torch
from alignvlm.system.waiting import Waiting
with Waiting() as others:
    if os.environ["RANK"] == "0":
        time.sleep(8)
        others.go_on()
    else:
        others.wait()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=3))
value = torch.ones(1)
torch.distributed.all_reduce(value)
torch.distributed.destroy_process_group()
sys.exit(int(value) != 2)
"""
PREPARES = """
import time
from alignvlm.system.waiting import Waiting
with Waiting():
    print("up", flush=True)
    time.sleep(600)
"""


def environment_of(rank: int, port: int, **extra: str) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | extra


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def rank_0(port: int) -> Iterator[subprocess.Popen[str]]:
    """A process that prepares for ten minutes."""
    environment = job_environment(**environment_of(0, port))
    with subprocess.Popen(
        [sys.executable, "-c", PREPARES], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def test_preparing_may_take_longer_than_a_collective(port: int, tmp_path: Path) -> None:
    """Rank 0 prepares for eight seconds; a collective may take three."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB], cwd=ROOT, env=job_environment(**environment_of(rank, port)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)] == [(0, ""), (0, "")]


def failure_of(rank: Waiting) -> str:
    """The line with which a rank gives up."""
    with rank, pytest.raises(DataError) as caught:
        rank.wait()
    assert isinstance(caught.value.__cause__, OSError)
    return str(caught.value)


def test_rank_0_that_dies_while_it_prepares_ends_the_others(
    port: int, rank_0: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "LAST_WORD_SECONDS", 0.0)
    threading.Timer(1.0, rank_0.kill).start()
    began = time.monotonic()
    assert failure_of(Waiting(environment_of(1, port))) == (
        "rank 0 has ended while it prepared, and says why; the same command starts again"
    )
    assert time.monotonic() - began < 20


def test_rank_0_that_is_frozen_ends_the_others(port: int, rank_0: subprocess.Popen[str]) -> None:
    rank_0.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    rank = Waiting(environment_of(1, port), stale=3.0)
    threading.Timer(1.0, rank_0.send_signal, [signal.SIGCONT]).start()
    threading.Timer(3.0, rank_0.send_signal, [signal.SIGSTOP]).start()
    assert "no sign of life for" in failure_of(rank)
    assert 3 < time.monotonic() - began < 20


def test_nobody_at_the_address_is_one_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.5)
    assert f"rank 0 has not come up at 127.0.0.1:{port}" in failure_of(Waiting(environment_of(1, port)))
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT is not set"):
        Waiting({"RANK": "1", "WORLD_SIZE": "2"}).__enter__()


@pytest.mark.parametrize("jobs", [("", ""), ("12", "13")])
def test_no_rank_joins_the_job_before(port: int, jobs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The store of a job that ends is still open on the same port: it let this rank in once, or has another name."""
    named = [{"SLURM_JOB_ID": job} if job else {} for job in jobs]
    before = Waiting(environment_of(0, port, **named[0]))
    with before:
        before.go_on()
        if not jobs[0]:
            with Waiting(environment_of(1, port)) as rank:
                rank.wait()
        late = Waiting(environment_of(1, port, **named[1]))
        thread = threading.Thread(target=late.wait)
        thread.start()
        thread.join(1.5)
        assert thread.is_alive()
    with Waiting(environment_of(0, port, **named[1])) as now:
        thread.join(1.0)
        assert thread.is_alive()
        now.go_on()
        thread.join(10)
        assert not thread.is_alive()
    said = f"rank 1: the job before still answers at 127.0.0.1:{port}; waiting for its end\n"
    assert capsys.readouterr().out == said


def test_an_answer_that_is_lost_does_not_keep_a_rank_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has let the rank in, but the rank does not hear of it and asks again."""
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 20.0)
    lost: list[bool] = []

    class Flaky:
        def __init__(self, store: Any) -> None:
            self._store = store

        def compare_set(self, *arguments: str) -> bytes:
            answer: bytes = self._store.compare_set(*arguments)
            if not lost:
                lost.append(True)
                raise RuntimeError("timed out")
            return answer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

    connect = Waiting._connect
    with Waiting(environment_of(0, port)) as first:
        first.go_on()
        monkeypatch.setattr(Waiting, "_connect", lambda self: Flaky(connect(self)))
        with Waiting(environment_of(1, port)) as other:
            other.wait()
    assert lost

"""Which GPU is whose; what a process sets up before it joins the others."""

from __future__ import annotations

import os
import subprocess

import deepspeed
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from alignvlm.errors import UserError
from alignvlm.training import distributed
from alignvlm.training.distributed import choose_gpu

ON_A_CPU = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu",
    "PYTORCH_ALLOC_CONF": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "is_chosen", "gpu"), [(0, 8, False, 0), (7, 8, True, 7), (5, 1, True, 0)]
)
def test_a_process_takes_its_gpu(local_rank: int, num_gpus: int, is_chosen: bool, gpu: int) -> None:
    assert choose_gpu(local_rank, num_gpus, is_chosen) == gpu


@pytest.mark.parametrize(("num_gpus", "is_chosen"), [(4, False), (4, True), (1, False)])
def test_more_processes_than_gpus_is_one_line(num_gpus: int, is_chosen: bool) -> None:
    with pytest.raises(UserError, match=f"process 6 of this host has no GPU: {num_gpus} seen here"):
        choose_gpu(5, num_gpus, is_chosen)


def test_training_on_a_cpu_keeps_the_memory_that_a_step_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def join(**options: object) -> None:
        done.append("join")
        raise ConnectionError

    for name, value in ON_A_CPU.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "keep_memory", lambda: done.append("keep"))
    monkeypatch.setattr(deepspeed, "init_distributed", join)
    with pytest.raises(ConnectionError):
        distributed.start(timeout_minutes=1)
    assert done == ["keep", "join"]


@pytest.mark.parametrize(("asked", "expected"), [(None, "expandable_segments:True"), ("max_split_size_mb:64",) * 2])
def test_the_allocator_leaves_no_gaps_unless_told_otherwise(
    asked: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ON_A_CPU, "PYTORCH_ALLOC_CONF": asked or ""}.items():
        monkeypatch.setenv(name, value)
    if asked is None:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "keep_memory", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        distributed.start(timeout_minutes=1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == expected


def test_deepspeed_starts_no_program_to_count_the_processes_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for their number whenever it reduces gradients."""
    for name, value in {**ON_A_CPU, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "keep_memory", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        distributed.start(timeout_minutes=1)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: pytest.fail("a program"))
    assert CPU_Accelerator().device_count() == 2

"""How ranks come together: which GPU is whose, and waiting for rank 0 longer than a collective may take."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignvlm.errors import UserError
from alignvlm.launch.local import free_port
from alignvlm.training.distributed import choose_gpu
from tests.jobs import ROOT, job_environment

LATE = """
import os, sys, time
from datetime import timedelta
import torch
from alignvlm.training.distributed import join
if os.environ["RANK"] == "0":
    time.sleep(6)
join("gloo", torch.device("cpu"), timedelta(seconds=4))
value = torch.ones(1)
torch.distributed.all_reduce(value)
sys.exit(int(value) != 2)
"""


def test_ranks_wait_for_rank_0_longer_than_for_a_collective() -> None:
    environment = job_environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [
        subprocess.Popen([sys.executable, "-c", LATE], cwd=ROOT, env=environment | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "is_chosen", "gpu"), [(0, 8, False, 0), (7, 8, True, 7), (5, 1, True, 0)]
)
def test_a_process_takes_its_gpu(local_rank: int, num_gpus: int, is_chosen: bool, gpu: int) -> None:
    assert choose_gpu(local_rank, num_gpus, is_chosen) == gpu


@pytest.mark.parametrize(("num_gpus", "is_chosen"), [(4, False), (4, True), (1, False)])
def test_more_processes_than_gpus_is_one_line(num_gpus: int, is_chosen: bool) -> None:
    with pytest.raises(UserError, match=f"process 6 of this host has no GPU: {num_gpus} seen here"):
        choose_gpu(5, num_gpus, is_chosen)

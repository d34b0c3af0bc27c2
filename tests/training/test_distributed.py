"""Which GPU is whose."""

from __future__ import annotations

import pytest

from alignvlm.errors import UserError
from alignvlm.training.distributed import choose_gpu


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "is_chosen", "gpu"), [(0, 8, False, 0), (7, 8, True, 7), (5, 1, True, 0)]
)
def test_a_process_takes_its_gpu(local_rank: int, num_gpus: int, is_chosen: bool, gpu: int) -> None:
    assert choose_gpu(local_rank, num_gpus, is_chosen) == gpu


@pytest.mark.parametrize(("num_gpus", "is_chosen"), [(4, False), (4, True), (1, False)])
def test_more_processes_than_gpus_is_one_line(num_gpus: int, is_chosen: bool) -> None:
    with pytest.raises(UserError, match=f"process 6 of this host has no GPU: {num_gpus} seen here"):
        choose_gpu(5, num_gpus, is_chosen)

"""Batches on their way to a GPU (`make gpu-check`): page-locked, copied while it is busy, whole when they arrive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.loading.loader import build_loader
from data_pipeline.order.plan import Plan
from data_pipeline.shards.sources import Source
from tests.data_pipeline.loading.test_loader import SMALL, same

pytestmark = pytest.mark.cuda


def test_batches_arrive_whole_when_the_gpu_lags_behind(source: Source, encoder: Any, device: torch.device) -> None:
    """Copies of all steps wait in the GPU's queue while the loader takes its memory back and fills it again."""
    plan = Plan({"letters": source}, {"letters": 1.0}, replace(SMALL, seed=3, epochs=2))
    expected = [batch for step in build_loader(plan, encoder, num_workers=0) for batch in step]
    found = []
    for step in build_loader(plan, encoder, num_workers=2, prefetch=2, pin_memory=True):
        for batch in step:
            assert batch.tiles.is_pinned() or not batch.tiles.numel()  # an empty tensor has no memory to lock
            assert batch.input_ids.is_pinned()
            torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
            found.append(batch.to(device))
    torch.cuda.synchronize()
    assert len(found) == len(expected)
    assert all(same(one.to("cpu", non_blocking=False), other) for one, other in zip(found, expected, strict=True))

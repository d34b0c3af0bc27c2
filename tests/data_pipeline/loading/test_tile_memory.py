"""Tile memory: blocks never overlap, are freed exactly when nothing uses them, and cross processes by number."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

from data_pipeline.loading import tile_memory
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.tile_memory import Block, TileMemory
from data_pipeline.loading.worker import WorkResult
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.sources import Source
from tests.data_pipeline.loading.test_loader import same

PAGE = 4096


def allocated(memory: TileMemory, size: int) -> Block:
    block = memory.allocate(size)
    assert block is not None
    return block


def test_blocks_do_not_overlap_and_first_free_bytes_are_used_again() -> None:
    memory = TileMemory(10 * PAGE)
    blocks = [allocated(memory, size) for size in (PAGE, 2 * PAGE + 1, PAGE - 1)]
    assert [block.offset for block in blocks] == [0, PAGE, 4 * PAGE]
    assert memory.allocate(6 * PAGE) is None
    assert memory.allocate(0) is None
    memory.free(blocks[1].offset)
    assert allocated(memory, 3 * PAGE).offset == PAGE
    assert allocated(memory, 5 * PAGE).offset == 5 * PAGE
    assert memory.allocate(1) is None


def test_a_block_is_freed_with_the_last_view_of_its_tensor() -> None:
    memory = TileMemory(PAGE)
    block = allocated(memory, 12)
    block.tensor((2, 6)).copy_(torch.arange(12).view(2, 6))
    tensor = pickle.loads(pickle.dumps(block)).owning_tensor((2, 6))
    view = tensor[1, 2:].view(2, 2)
    del tensor
    assert memory.allocate(1) is None
    assert view.tolist() == [[8, 9], [10, 11]]
    del view
    assert allocated(memory, PAGE).offset == 0


def test_a_forked_process_fills_the_same_memory() -> None:
    memory = TileMemory(PAGE)
    message = pickle.dumps(allocated(memory, 6))
    child = os.fork()
    if child == 0:
        pickle.loads(message).tensor((2, 3)).fill_(7)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pickle.loads(message).owning_tensor((2, 3)).tolist() == [[7, 7, 7], [7, 7, 7]]


def test_a_batch_outlives_the_process_that_made_it(source: Source, encoder: Any) -> None:
    """Nothing of it has to be asked for there."""
    plan = Plan({"letters": source}, {"letters": 1.0}, PlanSettings(sequence_length=120, global_batch_packs=4))
    [batch] = next(iter(build_loader(plan, encoder, num_workers=0, micro_batch_packs=4)))
    block, shape = allocated(TileMemory(), batch.tiles.nbytes), tuple(batch.tiles.shape)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        block.tensor(shape).copy_(batch.tiles)
        result = WorkResult(replace(batch, tiles=block.tensor(shape)), [], 4, block)
        with open(writing, "wb") as file:
            file.write(ForkingPickler.dumps(result))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        message = file.read()
    assert os.waitpid(child, 0)[1] == 0
    received = pickle.loads(message).batch
    assert same(received, batch)
    received.input_ids.add_(1)  # it may be written to


@pytest.mark.parametrize("capacity", [PAGE, 8 * PAGE, tile_memory.CAPACITY])
def test_batches_are_the_same_in_any_memory(
    source: Source, encoder: Any, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    """Too little memory (some batches travel without), just enough if it is used again, and plenty."""
    memories = []

    class Recorded(TileMemory):
        def __init__(self) -> None:
            super().__init__(capacity)
            memories.append(self)

    settings = PlanSettings(sequence_length=120, global_batch_packs=4, epochs=2)
    plan = Plan({"letters": source}, {"letters": 1.0}, settings)
    expected = [step[0].tiles for step in build_loader(plan, encoder, num_workers=0, micro_batch_packs=4)]
    monkeypatch.setattr("data_pipeline.loading.loader.TileMemory", Recorded)
    loader = build_loader(plan, encoder, num_workers=2, prefetch=2, micro_batch_packs=4)
    kept = []
    for number, (step, tiles) in enumerate(zip(loader, expected, strict=True)):
        assert torch.equal(step[0].tiles, tiles)
        if number % 10 == 0:
            kept.append((step[0].tiles, tiles))
    assert all(torch.equal(mine, tiles) for mine, tiles in kept)
    (memory,) = memories
    del kept, step
    assert memory.allocate(capacity) is not None  # all of it was freed

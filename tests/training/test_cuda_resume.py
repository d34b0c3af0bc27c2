"""Checkpoints of a training on a GPU (`make gpu-check`): resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignvlm.training.checkpoints.export import consolidate
from alignvlm.training.checkpoints.store import CheckpointInfo, CheckpointStore
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from tests.one_rank import differing, masters, micro_batches, take_step, trainer_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny_model(text={"hidden_size": 64, "head_dim": 16})[0].save_pretrained(folder)
    return folder


def everything(trainer: Trainer, world: World) -> dict[str, torch.Tensor]:
    """What training goes on from: fp32 weights, the optimizer's states, weights of the forward pass."""
    learned = {f"{name}/fp32": value.cpu() for name, value in masters(trainer).items()}
    states = enumerate(trainer.engine.optimizer.optimizer.state.values())
    moments = {
        f"{i}/{key}": torch.as_tensor(value).cpu().clone() for i, state in states for key, value in state.items()
    }
    assert moments
    return {**learned, **moments, **(consolidate(trainer.model, world) or {})}


def train_and_save(trainer: Trainer, store: CheckpointStore, world: World) -> dict[str, Any]:
    """Two steps, a checkpoint that is written while two more steps are taken; what there was at the end of each."""
    store.attach(trainer.engine)
    for _ in range(2):
        take_step(trainer, micro_batches(4), world)
    saved = everything(trainer, world)
    assert store.begin(trainer.engine, {"step": 2, "world_size": 1}) is None
    losses = [take_step(trainer, micro_batches(4), world).loss for _ in range(2)]
    assert store.finish() is None
    return {"saved": saved, "losses": losses, "end": everything(trainer, world)}


def found_in(store: CheckpointStore) -> CheckpointInfo:
    found = store.newest(print)
    assert found is not None
    assert found.step == 2
    return found


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_resuming_changes_no_bit(strategy: str, export: Path, world: World, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", world, keep_last=1, keep_every=None)
    trainer = trainer_of(export, strategy, world)
    try:
        expected = train_and_save(trainer, store, world)
    finally:
        trainer.close()
    again = trainer_of(export, strategy, world)
    try:
        assert store.load(again.engine, found_in(store)) is None
        assert differing(everything(again, world), expected["saved"]) == []
        steps = [state["step"] for state in again.engine.optimizer.optimizer.state.values()]
        assert [float(step) for step in steps] == [2.0] * len(steps)
        assert {step.device.type for step in steps} == {world.device.type}  # where the fused AdamW wants it
        assert [take_step(again, micro_batches(4), world).loss for _ in range(2)] == expected["losses"]
        assert differing(everything(again, world), expected["end"]) == []
    finally:
        again.close()

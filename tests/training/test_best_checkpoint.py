"""Which checkpoint `checkpoint.keep_best` keeps: also after a resume, and after a kill in the midst of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from alignvlm.training.checkpoints import store as checkpoint
from alignvlm.training.checkpoints.store import CheckpointStore
from tests.training.fakes import FakeWorld
from tests.training.test_checkpoint import Engine, names


def save_scored(store: CheckpointStore, losses: dict[int, float | None]) -> None:
    """Save a checkpoint at each step, with its held-out loss."""
    engine = Engine()
    store.attach(engine)
    for step, loss in losses.items():
        assert store.begin(engine, {"step": step, "scores": {"loss/held_out": loss}}) is None
        assert store.finish() is None


def test_the_best_is_kept_also_by_the_next_start(tmp_path: Path) -> None:
    def start() -> CheckpointStore:
        return CheckpointStore(tmp_path, FakeWorld(), keep_last=2, keep_every=None, keep_best="loss/held_out")

    save_scored(start(), {10: None, 20: 3.0, 30: 2.0, 40: 2.0, 50: 2.5})
    assert names(start()) == ["step-00000030", "step-00000040", "step-00000050"]  # the earlier one of two equal ones
    save_scored(start(), {60: 4.0})
    assert names(start()) == ["step-00000030", "step-00000050", "step-00000060"]
    save_scored(start(), {70: 1.0, 80: 9.0, 90: 9.0})
    assert names(start()) == ["step-00000070", "step-00000080", "step-00000090"]


def test_a_kill_after_saving_or_while_removing_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, FakeWorld(), keep_last=1, keep_every=None, keep_best="loss/held_out")
    save_scored(store, {10: 3.0, 20: 2.0})
    with monkeypatch.context() as killed:
        killed.setattr(store, "_remove_old", lambda: None)  # after the new one has its name
        save_scored(store, {30: 1.0})
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda folder, **options: (folder / "manifest.json").unlink(missing_ok=True))
        save_scored(store, {40: 5.0})
    assert [folder.name for folder in checkpoint.checkpoint_folders(tmp_path)] == ["step-00000030", "step-00000040"]
    save_scored(store, {50: 4.0})
    assert names(store) == ["step-00000030", "step-00000050"]


@pytest.mark.parametrize(("scores", "best"), [
    ({"loss/held_out": 1.9}, True), ({"loss/held_out": 2.0}, False), ({"loss/held_out": float("nan")}, False),
    ({"loss/other": 0.1}, False),
])  # fmt: skip
def test_what_is_best_is_asked_of_the_checkpoints_before(tmp_path: Path, scores: Any, best: bool) -> None:
    store = CheckpointStore(tmp_path, FakeWorld(), keep_last=9, keep_every=None, keep_best="loss/held_out")
    save_scored(store, {10: 2.0, 20: None, 40: 1.0})  # the last one is damaged, and its steps are taken again
    assert store.is_best(scores, step=30) is best
    assert store.is_best({"loss/held_out": 9.0}, step=5)

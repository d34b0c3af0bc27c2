"""Checkpoint folders: valid only with a manifest, damage passed over, old ones removed, full disks survived."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignvlm.training.checkpoints import store as checkpoint
from alignvlm.training.checkpoints.background import snapshot
from alignvlm.training.checkpoints.store import MANIFEST, TAG, CheckpointStore
from tests.training.fakes import FakeWorld


class Engine:
    """Writes two files as DeepSpeed does, through its checkpoint engine."""

    def __init__(self) -> None:
        self._config = None
        self.checkpoint_engine = None
        self.weights = torch.arange(1000.0)

    def save_checkpoint(self, folder: str, tag: str) -> None:
        (Path(folder) / tag).mkdir()
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"weights": self.weights}, f"{folder}/{tag}/{name}")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", FakeWorld(), keep_last=2, keep_every=40)


def save(store: CheckpointStore, *steps: int, engine: Engine | None = None) -> None:
    engine = engine or Engine()
    store.attach(engine)
    for step in steps:
        assert store.begin(engine, {"step": step}) is None
        assert store.finish() is None


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_newest_is_found_and_old_ones_go(store: CheckpointStore) -> None:
    assert store.newest(print) is None
    save(store, 10, 40, 50, 60, 70)
    assert names(store) == ["step-00000040", "step-00000060", "step-00000070"]
    found = store.newest(print)
    assert found is not None
    assert found.step == 70
    assert store.newest_step == 70


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "no manifest", "format"])
def test_damaged_checkpoints_are_named_and_passed_over(store: CheckpointStore, damage: str) -> None:
    save(store, 10, 20)
    folder = store.folder / "step-00000020"
    file = folder / TAG / "model.pt"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (folder / MANIFEST).write_text("{")
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert "step-00000020 is not valid" in said[0]


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared_away(store: CheckpointStore) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 20}) is None  # the process dies here
    store.close()
    again = CheckpointStore(store.folder, FakeWorld(), 2, None)
    found = again.newest(print)
    assert found is not None
    assert found.step == 10
    save(again, 30)
    assert names(again) == ["step-00000010", "step-00000030"]


def test_training_may_change_weights_while_they_are_written(store: CheckpointStore) -> None:
    engine = Engine()
    store.attach(engine)
    store.begin(engine, {"step": 10})
    engine.weights.add_(1)
    assert store.finish() is None
    written = torch.load(store.folder / "step-00000010" / TAG / "model.pt", weights_only=True)["weights"]
    assert torch.equal(written, torch.arange(1000.0))


def test_a_full_disk_is_seen_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    problem = store.begin(Engine(), {"step": 20})
    assert problem is not None
    assert "a checkpoint needs" in problem
    assert store.newest_step == 10
    assert names(store) == ["step-00000010"]


def test_a_disk_that_fills_up_while_writing_gives_the_checkpoint_up(store: CheckpointStore, monkeypatch) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert store.begin(engine, {"step": 20}) is None
        problem = store.finish()
    assert problem is not None
    assert "No space left on device" in problem
    assert names(store) == ["step-00000010"]
    save(store, 30, engine=engine)
    assert store.newest_step == 30


def test_snapshot_keeps_structure_and_shared_storage() -> None:
    shared = torch.zeros(3)
    copied = snapshot({"a": shared, "b": [shared, (1, "x")], "empty": torch.zeros(0)}, {})
    assert copied["a"] is copied["b"][0]
    assert copied["a"] is not shared
    assert copied["b"][1] == (1, "x")


def test_the_format_is_announced() -> None:
    changelog = (Path(checkpoint.__file__).parents[3] / "CHANGELOG.md").read_text()
    assert f"Checkpoint format: {checkpoint.FORMAT}" in changelog

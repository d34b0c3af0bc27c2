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
from alignvlm.training.checkpoints.files import sealing, written
from alignvlm.training.checkpoints.files.manifest import FORMAT, MANIFEST, first_difference
from alignvlm.training.checkpoints.store import TAG, CheckpointStore
from tests.fixtures.damage import full_disk
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
        assert store.begin(engine, {"step": step, "world_size": 1}) is None
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


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", FakeWorld(), keep_last=1, keep_every=30)
    save(store, 30, 60)
    (store.folder / "step-00000060" / TAG / "model.pt").unlink()
    again = CheckpointStore(store.folder, FakeWorld(), keep_last=1, keep_every=None)
    found = again.newest(lambda line: None)
    assert found is not None
    assert again.newest_step == found.step == 30  # a loss that jumps leads back there
    save(again, 40)
    assert again.newest_step == 40
    found = CheckpointStore(store.folder, FakeWorld(), 1, None).newest(lambda line: None)
    assert found is not None
    assert found.step == 40
    save(again, 60)
    assert names(again) == ["step-00000060"]
    assert first_difference(store.folder / "step-00000060") is None


def test_below_the_first_step_there_is_no_checkpoint(store: CheckpointStore) -> None:
    save(store, 0)
    assert store.newest(print, before=0) is None


DAMAGED_MANIFESTS = {
    "manifest": "{", "empty": "", "list": "[]", "no files": '{"format": 1}',
    "other files": '{"format": 1, "files": []}',
    "nothing in it": '{"format": 1, "files": {}}', "nested": "[" * 5_000,
    "outside": '{"format": 1, "files": {"state.json": {"size": 1, "crc32": 1}, "../x": {"size": 1, "crc32": 1}}}',
}  # fmt: skip


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "delete", "endless", "link", "no manifest", "format", *DAMAGED_MANIFESTS]
)
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
    elif damage == "endless":
        file.unlink()
        file.symlink_to("/dev/zero")
    elif damage == "link":
        file.rename(store.folder / "elsewhere.pt")
        file.symlink_to(store.folder / "elsewhere.pt")
    elif damage in DAMAGED_MANIFESTS:
        (folder / MANIFEST).write_text(DAMAGED_MANIFESTS[damage])
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


def test_only_real_folders_named_after_a_step_are_checkpoints(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 10)
    others = ("step-00000010-copy2", "step-9x", "step-00000040.universal")
    for name in others:
        shutil.copytree(store.folder / "step-00000010", store.folder / name)
    shutil.copytree(store.folder / "step-00000010", tmp_path / "mine")
    (store.folder / "step-00000005").symlink_to(tmp_path / "mine")
    (store.folder / "step-00000099").symlink_to(tmp_path / "nothing")
    (store.folder / "step-00000098").touch()
    save(store, 20, 30)
    assert store.newest_step == 30
    found = store.newest(print)
    assert found is not None
    assert found.step == 30
    left = {*others, "step-00000005", "step-00000099", "step-00000098", "step-00000020", "step-00000030"}
    assert set(names(store)) == left
    assert (tmp_path / "mine" / MANIFEST).exists()


def test_a_checkpoint_whose_place_is_taken_is_given_up(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 10)
    (store.folder / "step-00000020").symlink_to(tmp_path)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 20}) is None
    problem = store.finish()
    assert problem is not None
    assert "step-00000020" in problem
    assert store.newest_step == 10
    save(store, 30, engine=engine)
    assert names(store) == ["step-00000010", "step-00000020", "step-00000030"]


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared_away(store: CheckpointStore) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 20, "world_size": 1}) is None
    store.close()  # the process dies here
    (store.folder / "step-00000020.partial" / "files-00000.json").unlink()
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


@pytest.mark.parametrize("piece", [512, 1 << 20])
def test_a_real_disk_that_fills_up_gives_the_checkpoint_up(
    store: CheckpointStore, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's C++ writer never sees the error."""
    monkeypatch.setattr(written, "PIECE", piece)
    monkeypatch.setattr(written, "BLOCK", piece)
    engine = Engine()
    store.attach(engine)
    with full_disk(3000):
        assert store.begin(engine, {"step": 20}) is None
        problem = store.finish()
    assert problem is not None
    assert "File too large" in problem
    assert names(store) == []
    save(store, 30, engine=engine)
    assert store.newest_step == 30


def test_what_deepspeed_writes_itself_is_in_the_manifest(store: CheckpointStore) -> None:
    engine = Engine()
    store.attach(engine)
    store.begin(engine, {"step": 10})
    (store.folder / "step-00000010.partial" / TAG / "offloaded").write_text("x")
    assert store.finish() is None
    assert first_difference(store.folder / "step-00000010") is None
    (store.folder / "step-00000010" / TAG / "offloaded").write_text("y")
    assert "offloaded: size or checksum" in str(first_difference(store.folder / "step-00000010"))


@pytest.mark.parametrize("what", ["files_in", "write_atomic", "sync"])
def test_a_disk_that_fails_while_the_manifest_is_written_costs_the_checkpoint(
    store: CheckpointStore, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 20}) is None

    def fail(*args: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(sealing, what, fail)
        problem = store.finish()
    assert problem is not None
    assert "Disk quota exceeded" in problem
    assert names(store) == ["step-00000010"]
    save(store, 30, engine=engine)
    assert store.newest_step == 30


def test_files_of_ranks_on_hosts_that_rank_0_does_not_see_yet_are_in_the_manifest(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 10}) is None
    of_another = {f"{TAG}/model-1.pt": {"size": 3, "crc32": 4}}
    monkeypatch.setattr(store.world, "all_gather", lambda value: [value, of_another if value else None])
    assert store.finish() is None
    manifest = json.loads((store.folder / "step-00000010" / MANIFEST).read_text())
    assert list(manifest["files"]) == sorted(manifest["files"])
    assert manifest["files"].items() > of_another.items()
    assert {checkpoint.STATE, "random-00000.pt", f"{TAG}/model.pt", f"{TAG}/optimizer.pt"} < manifest["files"].keys()


def test_old_checkpoints_that_cannot_be_removed_stay(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 10, 20)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 30}) is None

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        assert store.finish() is None
    assert "step-00000010 cannot be removed: Permission denied" in caplog.text
    assert store.newest_step == 30


def test_a_disk_that_fails_while_old_ones_are_looked_for_costs_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 10}) is None
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "checkpoint_folders", fail)
        assert store.finish() is None
    assert "old checkpoints cannot be found and stay: Input/output error" in caplog.text
    assert store.newest_step == 10


def test_deepspeed_writes_nothing_by_itself(store: CheckpointStore) -> None:
    engine = Engine()
    store.attach(engine)
    assert engine.checkpoint_engine is not None
    assert engine.checkpoint_engine.is_decoupled()
    assert engine.checkpoint_engine.get_commit_info() is None


def test_the_format_is_announced() -> None:
    changelog = (Path(checkpoint.__file__).parents[3] / "CHANGELOG.md").read_text()
    assert f"Checkpoint format: {FORMAT}" in changelog

"""A save that all ranks had written when their job ended is sealed by the next start, and checked as any other."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from alignvlm.training.checkpoints.files import sealing
from alignvlm.training.checkpoints.files.manifest import MANIFEST, first_difference
from alignvlm.training.checkpoints.store import TAG, CheckpointStore
from tests.training.fakes import FakeWorld
from tests.training.test_checkpoint import Engine, save

WHOLE = "all ranks had written it when the job before ended"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", FakeWorld(), keep_last=2, keep_every=40)


@pytest.mark.parametrize("lack", [None, "a list", "a rank", "another file", "newer", "sealing was killed"])
def test_a_save_that_all_ranks_had_written_is_sealed_late(store: CheckpointStore, lack: str | None) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)
    assert store.begin(engine, {"step": 20, "world_size": 2 if lack == "a rank" else 1}) is None
    store.close()  # all files are there; now the process dies
    partial = store.folder / "step-00000020.partial"
    if lack == "a list":
        (partial / "files-00000.json").unlink()
    elif lack == "another file":  # which nobody may have flushed
        (partial / TAG / "offloaded").write_text("x")
    elif lack == "newer":
        save(CheckpointStore(store.folder.parent / "other", FakeWorld(), 1, None), 30)
        (store.folder.parent / "other" / "step-00000030").rename(store.folder / "step-00000030")
    elif lack == "sealing was killed":
        (partial / MANIFEST).write_text("{}")
        (partial / f".{MANIFEST}.a.tmp").write_text("{")
    said: list[str] = []
    found = CheckpointStore(store.folder, FakeWorld(), 2, None).newest(said.append)
    is_sealed = lack in (None, "sealing was killed")
    assert found is not None
    assert found.step == {None: 20, "sealing was killed": 20, "newer": 30}.get(lack, 10)
    assert [WHOLE in line for line in said] == [True] * is_sealed
    assert partial.exists() != is_sealed
    assert first_difference(found.folder) is None


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_whole_save_below_a_damaged_checkpoint_is_sealed(store: CheckpointStore, is_whole: bool) -> None:
    """What a kill leaves between the new name of an old checkpoint and its removal, or in the midst of that."""
    save(store, 40, 50, 60)
    (store.folder / "step-00000040").rename(store.folder / "step-00000040.partial")
    (store.folder / "step-00000050").rename(store.folder / "step-00000050.partial")
    if not is_whole:
        (store.folder / "step-00000050.partial" / TAG / "model.pt").unlink()
    (store.folder / "step-00000060" / TAG / "model.pt").write_bytes(b"")
    said: list[str] = []
    again = CheckpointStore(store.folder, FakeWorld(), 2, None)
    found = again.newest(said.append)
    assert found is not None
    assert found.step == again.newest_step == (50 if is_whole else 40)
    assert ["step-00000060 is not valid" in said[0], WHOLE in said[1]] == [True, True]
    save(again, 70)
    assert not list(store.folder.glob("*.partial"))


def test_a_disk_that_fails_leaves_the_checkpoint_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 10, 20)
    (store.folder / "step-00000020").rename(store.folder / "step-00000020.partial")

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sealing, "write_atomic", fail)
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found.step == 10
    assert ["cannot be sealed: Input/output error" in line for line in said] == [True]


def test_a_disk_that_does_not_say_whether_there_is_a_checkpoint_leaves_the_one_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 10, 20)
    (store.folder / "step-00000020").rename(store.folder / "step-00000020.partial")
    exists = Path.exists

    def exists_or_fails(path: Path, **options: bool) -> bool:
        if path.name == "step-00000020":
            raise OSError(errno.EIO, "Input/output error")
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", exists_or_fails)
    found = store.newest(print)
    assert found is not None
    assert found.step == 10


def test_a_save_that_is_sealed_late_is_checked_as_any_other(store: CheckpointStore) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)
    store.begin(engine, {"step": 20, "world_size": 1})
    store.close()
    (file,) = store.folder.glob(f"step-00000020.partial/{TAG}/model.pt")
    file.write_bytes(file.read_bytes()[:-1])  # a power failure
    said: list[str] = []
    found = CheckpointStore(store.folder, FakeWorld(), 2, None).newest(said.append)
    assert found is not None
    assert found.step == 10
    assert [WHOLE in said[0], "model.pt: size or checksum differs" in said[1]] == [True, True]

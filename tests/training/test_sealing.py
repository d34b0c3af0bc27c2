"""A save that all ranks had written when their job ended is sealed by the next start, and checked as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

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

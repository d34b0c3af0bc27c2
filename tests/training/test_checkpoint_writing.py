"""What a save costs the training thread: a copy into memory that is reused; threads do the rest, and say how far."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

from alignvlm.training.checkpoints.files import reading, sealing, written
from alignvlm.training.checkpoints.files.manifest import first_difference
from alignvlm.training.checkpoints.staging import Staging
from alignvlm.training.checkpoints.store import CheckpointStore
from tests.training.fakes import FakeWorld
from tests.training.test_checkpoint import Engine, save


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", FakeWorld(), keep_last=2, keep_every=None)


def test_what_reaches_the_disk_is_progress(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "PIECE", 1000)
    monkeypatch.setattr(written, "BLOCK", 900)
    flushes: list[int] = []
    beats: list[int] = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flush(file), flushes.append(file)))
    monkeypatch.setattr(FakeWorld, "beat", lambda self: beats.append(len(flushes)))
    engine = Engine()
    store.attach(engine)
    store.begin(engine, {"step": 10})
    store.finish()
    size = sum(path.stat().st_size for path in (store.folder / "step-00000010").rglob("*.pt"))
    assert len(beats) >= size / 1800
    assert beats[0] >= 1


def test_nothing_is_read_back_and_the_disk_is_waited_for_in_threads(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    for name in ("fsync", "write", "rename", "unlink"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, do=original, **k: (threads.add(threading.get_ident()), do(*a, **k))[1])
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "checked", None)
        save(store, 10, 20, 30)
    assert threads
    assert threading.get_ident() not in threads
    assert first_difference(store.folder / "step-00000030") is None


def test_a_checkpoint_comes_to_be_in_two_parts_while_training_goes_on(store: CheckpointStore) -> None:
    engine = Engine()
    store.attach(engine)
    assert not store.is_written
    store.begin(engine, {"step": 10})
    while not store.is_written:
        time.sleep(0.001)
    assert store.finish(wait=False) is None
    while not store.is_written:
        time.sleep(0.001)
    assert store.newest_step == 10  # no thread waits for what comes next
    assert store.finish(wait=False) is None
    assert not store.is_written
    store.begin(engine, {"step": 20})
    assert store.finish() is None
    assert store.newest_step == 20


def test_a_lack_of_host_memory_costs_the_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 10)
    engine = Engine()
    store.attach(engine)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", fail)
        assert store.begin(engine, {"step": 20}) is None
    assert "Cannot allocate memory" in str(store.finish())
    assert store.newest_step == 10
    assert store.begin(engine, {"step": 30}) is None
    assert store.finish() is None
    assert store.newest_step == 30


def test_looking_at_a_large_checkpoint_is_progress(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 10)
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(reading, "BLOCK", 1000)
    beats: list[int] = []
    monkeypatch.setattr(FakeWorld, "beat", lambda self: beats.append(1))
    assert store.newest(pytest.fail) is not None
    assert len(beats) >= sum(path.stat().st_size for path in store.folder.rglob("*.pt")) / 1000


@pytest.mark.parametrize("size", [0, 1, 300, 301, 2_000])
def test_a_file_is_checked_in_pieces(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (written, reading):
        monkeypatch.setattr(module, "PIECE", 300)
        monkeypatch.setattr(module, "BLOCK", 70)
    content = random.Random(size).randbytes(size)
    with written.CheckedFile(str(tmp_path / "file"), lambda count: None) as file:
        for begin in range(0, size, 333):
            file.write(content[begin : begin + 333])
    assert (tmp_path / "file").read_bytes() == content
    assert file.entry == reading.checked(tmp_path / "file") == {"size": size, "crc32": zlib.crc32(content)}


def test_staging_keeps_structure_types_and_what_is_shared() -> None:
    shared = torch.arange(3.0)
    columns = torch.arange(6, dtype=torch.int64).view(2, 3).t()
    tree = {
        "a": shared,
        "b": [shared, (1, "x")],
        "empty": torch.zeros(0),
        "view": shared[1:],
        "bf16": shared.bfloat16(),
    }
    tree |= {"columns": columns, "scalar": torch.tensor(7), "flag": torch.tensor([True])}
    copied = Staging(torch.device("cpu")).copy(tree)
    assert copied["a"] is copied["b"][0]
    assert copied["b"][1] == (1, "x")
    for name in ("a", "empty", "view", "bf16", "columns", "scalar", "flag"):
        assert torch.equal(copied[name], tree[name])
        assert copied[name].dtype == tree[name].dtype
        assert copied[name].untyped_storage().nbytes() == tree[name].nbytes  # a file holds nothing else
    shared.add_(1)
    assert copied["a"].tolist() == [0, 1, 2]


def test_staging_takes_the_same_memory_again() -> None:
    staging = Staging(torch.device("cpu"))
    first = staging.copy([torch.ones(1000), torch.ones(10)])
    again = staging.copy([torch.zeros(900)])
    assert again[0].data_ptr() == first[0].data_ptr()
    assert staging.copy([torch.full((9000,), 2.0)])[0].sum() == 18000

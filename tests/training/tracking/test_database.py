"""The SQLite file of the runs: whole from its first moment, whoever is killed and however many start at once."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from alignvlm.training.tracking import database
from alignvlm.training.tracking.database import prepare_database, sqlite_file
from tests.jobs import empty_store


def test_only_files_of_sqlite_are_made() -> None:
    assert sqlite_file("sqlite:////a/b.db?x=1") == Path("/a/b.db")
    assert sqlite_file("sqlite:///b.db") == Path("b.db")
    for uri in ("sqlite://", "sqlite:///", "sqlite:///:memory:", "http://x/sqlite:///b.db", "postgresql://h/b.db"):
        assert sqlite_file(uri) is None


class FakeMlflow:
    """Makes tables as MLflow does: not at once. `steps` are called between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Path] = []
        self.then = lambda: None
        monkeypatch.setattr("mlflow.MlflowClient", self)

    def __call__(self, uri: str) -> FakeMlflow:
        path = sqlite_file(uri)
        assert path is not None
        self.seen.append(path)
        path.write_bytes(empty_store().read_bytes()[:8192])
        self.then()
        shutil.copy(empty_store(), path)
        return self

    def search_experiments(self, max_results: int) -> None:
        pass


def test_an_interrupt_leaves_nothing_that_the_next_run_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_store()
    path = tmp_path / "runs" / "mlflow.db"
    mlflow = FakeMlflow(monkeypatch)

    def interrupt() -> None:
        assert not path.exists()
        raise KeyboardInterrupt

    mlflow.then = interrupt
    with pytest.raises(KeyboardInterrupt):
        prepare_database(f"sqlite:///{path}")
    assert list(path.parent.iterdir()) == []
    mlflow.then = lambda: None
    prepare_database(f"sqlite:///{path}")
    assert path.read_bytes() == empty_store().read_bytes()


def test_the_first_of_several_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_store()
    path = tmp_path / "mlflow.db"
    mlflow = FakeMlflow(monkeypatch)
    together = threading.Barrier(4)
    mlflow.then = lambda: together.wait(10) and None
    inodes = []

    def start() -> None:
        prepare_database(f"sqlite:///{path}")
        inodes.append(path.stat().st_ino)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(mlflow.seen)) == 4
    assert inodes == [path.stat().st_ino] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_store()
    FakeMlflow(monkeypatch)

    def refuse(*names: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(database.os, "link", refuse)
    prepare_database(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / "mlflow.db").read_bytes() == empty_store().read_bytes()

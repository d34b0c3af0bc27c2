"""A home for libraries: kept where it can be written; caches move out of a read-only one; else a new one is made."""

from __future__ import annotations

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from alignvlm.system.home import CACHES, NAMES, ensure_home


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the new home will be."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"alignvlm-home-{os.getuid()}"


def test_a_home_that_can_be_written_is_kept(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = {"USER": "me"}
    ensure_home(environment)
    assert environment == {"USER": "me"}
    assert not own.exists()


def test_a_missing_home_is_replaced(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    for _ in range(2):
        environment = {"USER": "me"}
        ensure_home(environment)
        assert environment == {"USER": "me", "HOME": str(own)}
    assert own.stat().st_mode & 0o777 == 0o700


def test_what_others_put_in_its_place_is_not_used(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    own.mkdir()
    own.chmod(0o777)
    environment = {"USER": "me"}
    ensure_home(environment)
    assert environment["HOME"] != str(own)
    assert Path(environment["HOME"]).parent == tmp_path


def test_in_a_read_only_home_only_caches_move(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    environment = {"USER": "me", "TRITON_HOME": "/fast"}
    ensure_home(environment)
    assert environment == {"USER": "me"} | dict.fromkeys(CACHES, str(own)) | {"TRITON_HOME": "/fast"}


def test_an_unknown_user_gets_a_home_and_a_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", *NAMES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    ensure_home()
    assert Path.home() == own
    assert getpass.getuser() == str(os.getuid())

"""Which folder is a node's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.stores.folders import VARIABLE, cache_folder


@pytest.mark.parametrize("why", ["is not an absolute path", "cannot be written"])
def test_a_cache_that_cannot_be_taken_is_named_once(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    own = "cache" if "path" in why else str(tmp_path / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(VARIABLE, own)
    assert cache_folder() == cache_folder() == tmp_path / "home" / "alignvlm"
    assert caplog.messages == [f"{VARIABLE}={own} {why}: the cache is {tmp_path / 'home' / 'alignvlm'}"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert len(caplog.messages) == 1

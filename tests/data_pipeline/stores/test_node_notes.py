"""What processes of a node tell each other about a store that one of them has given up."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from data_pipeline.errors import UnreachableError
from data_pipeline.stores.folders import store_of
from data_pipeline.stores.waiting.node_notes import note_given_up, raise_if_given_up, warn_once_a_minute


def test_only_who_waits_while_a_store_is_given_up_gives_it_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path))
    before = time.time() - 5
    note_given_up(store_of("s3://bucket/data/fields"), "no answer for 300 s")
    (note,) = tmp_path.rglob("*.given-up")
    os.utime(note, (before + 1, before + 1))
    with pytest.raises(UnreachableError, match="no answer for 300 s"):
        raise_if_given_up("S3://bucket/other/", [], before)
    raise_if_given_up("s3://another/data/fields", [], before)
    raise_if_given_up("s3://bucket/data/fields", [], before + 2)  # the next start
    os.utime(note, (before + 3600, before + 3600))  # the clock was set back since
    raise_if_given_up("s3://bucket/data/fields", [], before)


def test_what_nobody_gave_up_costs_nothing_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder has indexes by the hundred thousand, and others of the node wait meanwhile."""
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path))
    names, began = [f"{number:06d}.tar" for number in range(100_000)], time.time()
    note_given_up("s3://bucket/data/other.tar", "no answer for 300 s")
    os.utime(next(tmp_path.rglob("*.given-up")), (began - 5, began - 5))
    used = time.thread_time()
    raise_if_given_up("s3://bucket/data", names, began)
    assert time.thread_time() - used < 0.1
    note_given_up("s3://bucket/data/099999.tar", "no answer for 300 s")
    with pytest.raises(UnreachableError, match="no answer for 300 s"):
        raise_if_given_up("s3://bucket/data", names, began - 5)


def test_a_warning_is_said_once_a_minute_whatever_a_clock_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path))
    caplog.set_level(logging.WARNING)
    for seconds, said in ((0, 1), (-30, 1), (-90, 2), (3600, 3)):
        for note in (tmp_path / "warnings").glob("*"):
            os.utime(note, (time.time() + seconds,) * 2)
        warn_once_a_minute("s3://bucket", "it does not answer")
        warn_once_a_minute("s3://bucket", "it does not answer")
        assert len(caplog.records) == said

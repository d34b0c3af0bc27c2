"""Folders on the Hub: read at one commit, with the token of the environment, as from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.read_mode import Read
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import Source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.failures import AccessError, ReplacedError
from data_pipeline.stores.hub import held
from tests.data_pipeline.loading.test_loader import same
from tests.data_pipeline.stores.test_loading import plan_of
from tests.stores.fake_hub import TOKEN, FakeHub

URL = "hf://datasets/org/name/letters"
SHARDS: dict[str, Read] = {"letters": "shards"}


def files_of(folder: Path, suffix: str = "") -> dict[str, bytes]:
    return {f"letters/{path.name}": path.read_bytes() for path in folder.glob(f"*{suffix}") if path.is_file()}


def test_batches_are_those_from_disk_and_the_commit_stays(
    hub: FakeHub, shard_folder: Path, source: Source, encoder: Any
) -> None:
    first = hub.commit(files_of(shard_folder))
    near, far = plan_of(source), plan_of(open_source("letters", URL, encoder))
    assert far.fingerprint == near.fingerprint
    hub.commit({"letters/000003.tar": b"another file, in a later commit"})
    reference = [list(step) for step in build_loader(near, encoder, num_workers=0)]
    steps = [list(step) for step in build_loader(far, encoder, num_workers=2)]
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    assert {path.split("/")[5] for _, path in hub.log if "/resolve/" in path} == {first}
    assert sum("/api/datasets/" in path for _, path in hub.log) == 2  # the commit and its files, asked for once
    assert hub.keys_seen == []


def test_nodes_of_a_job_read_the_commit_that_rank_0_saw(
    hub: FakeHub, shard_folder: Path, source: Source, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.commit(files_of(shard_folder))
    with held() as commits:
        assert open_source("letters", URL, encoder).fingerprint == source.fingerprint
        hub.commit({"letters/manifest.json": b"{}", "letters/000003.tar": b"another file"})
        assert open_source("letters", URL, encoder).fingerprint == source.fingerprint
    assert commits == {"datasets/org/name@main": first}
    hub.log.clear()
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    helper.stop()
    with held() as theirs:
        theirs.update(commits)
        steps = list(build_loader(plan_of(open_source("letters", URL, encoder)), encoder, num_workers=1, reads=SHARDS))
    reference = list(build_loader(plan_of(source), encoder, num_workers=0))
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    assert {path.split("/")[5] for _, path in hub.log if "/resolve/" in path} == {first}
    assert sum("/resolve/" in path and path.endswith(".tar") for _, path in hub.log) == 8  # each shard once
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-3"))
    helper.stop()
    with pytest.raises(DataError, match="damaged"):
        open_source("letters", URL, encoder)


def test_a_branch_that_moves_takes_its_manifest_along(
    hub: FakeHub, shard_folder: Path, records: Any, tmp_path: Path
) -> None:
    """At once, though a manifest is looked for once a minute: an old one with new shards would be wrong."""
    hub.commit(files_of(shard_folder))
    reader = SourceReader(URL)
    renamed = ({**record, "key": f"new-{record['key']}"} for record in records(20))
    write_shards(renamed, tmp_path / "letters", samples_per_shard=10, num_processes=1)
    with held():
        assert SourceReader(URL).fingerprint == reader.fingerprint
        hub.commit(files_of(tmp_path / "letters"))
        assert SourceReader(URL).fingerprint == reader.fingerprint  # one command, one commit
    assert [SourceReader(URL)[number].key for number in (0, 19)] == ["new-s00000", "new-s00019"]
    assert reader[33].key == "s00033"


def test_a_folder_without_an_index_is_indexed_on_the_node(
    hub: FakeHub, shard_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = hub.commit(files_of(shard_folder, ".tar"))
    manifest = index_shards(URL, num_processes=2)
    assert manifest.fingerprint == index_shards(shard_folder, num_processes=1).fingerprint
    assert "cannot be written: its index and sample lengths are kept in" in caplog.text
    hub.log.clear()
    hub.commit({"README.md": b"a later commit"})
    assert index_shards(URL, num_processes=1) == manifest
    assert not [path for method, path in hub.log if method == "GET" and "/files/" in path]
    assert SourceReader(URL)[33].key == "s00033"
    tar = hub.commits[first]["letters/000001.tar"]
    hub.commit({"letters/000001.tar": tar[::-1]})
    with pytest.raises(
        ReplacedError, match=r"letters/000001\.tar was replaced since it was indexed .* the commit that"
    ):
        SourceReader(URL)
    pinned = URL.replace("name", f"name@{first}")
    assert index_shards(pinned, num_processes=1).fingerprint == manifest.fingerprint
    assert SourceReader(pinned)[44].key == "s00044"


def test_what_is_wrong_is_one_line_without_the_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit({"letters/x": b"1"})
    for url, said in {
        "hf://datasets/org/other/letters": "there is no such repository, or it needs another token; looked for HF",
        "hf://datasets/org/name@v9/letters": "there is no revision 'v9'",
        "hf://datasets/org/name/empty": r"no \.tar shards here",
        "hf://org/name": r"is not hf://datasets/ORGANISATION/NAME",
    }.items():
        with pytest.raises(DataError, match=said) as caught:
            index_shards(url)
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)
    with pytest.raises(LoadError, match="only read"):
        open_storage(URL).write("y", b"")
    monkeypatch.setenv("HF_TOKEN", "hf_another-token")
    helper.stop()
    with pytest.raises(AccessError, match="looked for HF_TOKEN") as caught:
        open_storage(URL).read("x")
    assert "another-token" not in str(caught.value)

"""Indexing: foreign shards alike, indexes kept while they fit, unsafe or edited input refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.index import index_name, index_shards, load_manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards
from tests.data_pipeline.tars import picture, write_tar


def test_foreign_image_caption_shards(tmp_path: Path, encoder: Any) -> None:
    folder = tmp_path / "foreign"
    for shard in range(2):
        members: list[tuple[str, bytes]] = [("./__meta__.txt", b"ignored")]
        for i in range(4):
            key = f"{shard:05d}/{shard}{i:08d}"
            caption = f"picture {i}"
            meta = json.dumps({"caption": caption, "url": "http://x"}).encode()
            members += [(f"{key}.jpg", picture(30 + i)), (f"{key}.txt", caption.encode()), (f"{key}.json", meta)]
        write_tar(folder / f"{shard:05d}.tar", members)
    manifest = index_shards(folder, num_processes=1)
    assert [shard.samples for shard in manifest.shards] == [4, 4]
    reader = SourceReader(folder, "web", prompt="Describe.")
    sample = reader[5]
    assert sample.key == "00001/100000001"
    assert sample.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Describe."}]
    assert sample.messages[1]["content"][0]["text"] == "picture 1"
    assert sample.images[0].size == (31, 20)
    assert sample.meta["url"] == "http://x"
    measure_source(folder, encoder, "Describe.", num_processes=2)
    source = open_source("web", folder, encoder, "Describe.")
    assert source.measures[5].tolist() == [4 + len("Describe.") + len("picture 1"), 1]
    with pytest.raises(DataError, match="not measured"):
        open_source("web", folder, encoder, "Another prompt.")


def test_indexing_again_keeps_what_fits_and_renews_the_rest(shard_folder: Path, tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "copy"
    manifest = write_shards(records(80), folder, samples_per_shard=40, num_processes=1)
    first = folder / index_name("000000.tar")
    stamp = first.stat().st_mtime_ns
    assert index_shards(folder, source="copy", num_processes=1).fingerprint == manifest.fingerprint
    assert first.stat().st_mtime_ns == stamp
    first.write_text("{broken")
    assert index_shards(folder, source="copy", num_processes=1).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt"])
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"x")])
    with pytest.raises(DataError, match="leaves its folder"):
        index_shards(tmp_path, num_processes=1)


def test_edited_manifests_are_noticed(tmp_path: Path, records: Any) -> None:
    write_shards(records(3), tmp_path / "out", num_processes=1)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"000000.tar", 3', '"000000.tar", 2'))
    with pytest.raises(DataError, match="edited"):
        load_manifest(open_storage(tmp_path / "out"))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        SourceReader(tmp_path)

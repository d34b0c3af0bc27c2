"""Indexing: foreign shards alike, indexes kept while they fit, unsafe or edited input refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, ShardInfo, ShardTable, load_manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sidecars import index_name
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
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


def test_indexing_again_keeps_how_the_shards_came_to_be(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "made"
    manifest = write_shards(records(4), folder, source="forms", origin={"generator": "fields"}, num_processes=1)
    (folder / index_name("000000.tar")).unlink()
    assert index_shards(folder, num_processes=1) == manifest == load_manifest(open_storage(folder))
    write_shards(records(5), tmp_path / "other", num_processes=1)
    (tmp_path / "other" / "000000.tar").replace(folder / "000001.tar")
    (folder / "000000.tar").unlink()
    assert index_shards(folder, num_processes=1).origin == {}


def exchange_members(index: Path) -> None:
    """The first two samples of an index point to each other's members; every line and checksum is valid."""
    lines = index.read_text().splitlines()
    one, two = json.loads(lines[1]), json.loads(lines[2])
    one["members"], two["members"] = two["members"], one["members"]
    lines[1:3] = json.dumps(one, separators=(",", ":")), json.dumps(two, separators=(",", ":"))
    index.write_text("\n".join(lines) + "\n")


def cut_a_line(index: Path) -> None:
    index.write_text(index.read_text().replace('"members"', '"mem', 1))


@pytest.mark.parametrize("damage", [exchange_members, cut_a_line, Path.unlink])
def test_an_index_that_is_not_the_manifests_is_made_anew(
    tmp_path: Path, records: Any, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "edited"
    manifest = write_shards(records(4), folder, num_processes=1)
    index = folder / index_name("000000.tar")
    whole = index.read_bytes()
    damage(index)
    assert len(verify_folder(folder, num_processes=1)) == 1
    assert SourceReader(folder)[0].messages[-1]["content"][0]["text"] == "x"
    assert caplog.messages == [f"{index} is damaged or missing and is made anew"]
    assert index.read_bytes() == whole
    damage(index)
    assert index_shards(folder, source="edited", num_processes=1).fingerprint == manifest.fingerprint
    assert index.read_bytes() == whole

    damage(index)
    write_shards(records(5), tmp_path / "other", num_processes=1)
    (tmp_path / "other" / "000000.tar").replace(folder / "000000.tar")
    with pytest.raises(LoadError, match=r"000000\.tar is not the shard that .*manifest\.json lists"):
        SourceReader(folder).entry(0)


def test_folders_indexed_by_version_1_are_read_and_keep_their_fingerprint(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "old"
    manifest = write_shards(records(4), folder, num_processes=1)
    index = folder / index_name("000000.tar")
    head, _, lines = index.read_text().partition("\n")
    header = json.loads(head)
    assert header.pop("digest") == manifest.shards[0].sha256
    old = json.dumps(header | {"version": 1}) + "\n" + lines
    assert hashlib.sha256(old.encode()).hexdigest() == manifest.shards[0].sha256  # as version 1 filled the manifest
    index.write_text(old)
    assert SourceReader(folder)[3].key == "s00003"
    assert index.read_text() == old
    assert verify_folder(folder, num_processes=1) == []
    assert index_shards(folder, source="old", num_processes=1).fingerprint == manifest.fingerprint
    assert json.loads(index.read_text().partition("\n")[0])["version"] == 3


def test_damaged_shards_are_refused_and_verify_says_the_same(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "cut"
    write_shards(records(6), folder, num_processes=1)
    shard = folder / "000000.tar"
    os.truncate(shard, -(-len(shard.read_bytes().rstrip(b"\0")) // 512) * 512)
    said = r"000000\.tar: the file ends without an end-of-archive mark \(byte [\d,]+, after 6 samples, .*'s00005'\)"
    (problem,) = verify_folder(folder, num_processes=1)
    assert re.search(said, problem)
    with pytest.raises(DataError, match=said):
        index_shards(folder, num_processes=1)


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt"])
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"x")])
    with pytest.raises(DataError, match="leaves its folder"):
        index_shards(tmp_path, num_processes=1)


def test_manifests_of_any_content_are_one_line(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "out"
    manifest = write_shards(records(4), folder, num_processes=1)
    (shard,), path = manifest.shards, folder / "manifest.json"
    content = json.loads(path.read_bytes())
    rows: list[Any] = [
        5,
        [],
        ["000000.tar", "4", 1, ""],
        ["000000.tar", -1, 1, ""],
        [5, 4, 1, ""],
        ["\ud800", 4, 1, ""],
        ["000000.tar", 4, 2**63, shard.sha256],
        ["000000.tar", 4, 1, shard.sha256[:-1]],
    ]
    for damaged in ("[" * 100_000, "[]", *(json.dumps(content | {"shards": [row]}) for row in rows)):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"manifest\.json is damaged \(.+\); run `alignvlm data index"):
            load_manifest(open_storage(folder))
    assert index_shards(folder, source="out", num_processes=1) == manifest
    replace(manifest, shards=ShardTable([replace(shard, samples=5)])).save(folder)
    with pytest.raises(LoadError, match=r"000000\.tar has 4 samples, not 5; index again"):
        SourceReader(folder).entry(0)


def test_a_manifest_is_the_same_however_its_json_is_laid_out(tmp_path: Path) -> None:
    names = ["plumless", "a/ä b", "buckeroo"]  # the CRC-32 of the first and the last is the same
    rows = [ShardInfo(name, number, 2**40 + number, f"{number:064x}") for number, name in enumerate(names, 1)]
    manifest = Manifest("s", ShardTable(rows), {"generator": "x"})
    manifest.save(tmp_path)
    lines = (tmp_path / "manifest.json").read_bytes()
    assert load_manifest(open_storage(tmp_path)) == manifest
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(lines), indent=4, ensure_ascii=False))
    found = load_manifest(open_storage(tmp_path))
    assert found == manifest
    assert list(found.shards) == rows
    assert found.shards[-2:] == rows[1:]
    assert dict(found.sizes) == {row.name: row.size for row in rows}
    assert [found.sizes.get(name) for name in (*names, "other", "\ud800")] == [*(row.size for row in rows), None, None]
    assert found.shard_starts().tolist() == [0, 1, 3, 6]


def test_edited_manifests_are_noticed(tmp_path: Path, records: Any) -> None:
    write_shards(records(3), tmp_path / "out", num_processes=1)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"000000.tar", 3', '"000000.tar", 2'))
    with pytest.raises(DataError, match="edited"):
        load_manifest(open_storage(tmp_path / "out"))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        SourceReader(tmp_path)

"""A folder in a bucket: indexed, measured and read as a local one, from one copy of its small files per node."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import Reading, verify_folder
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import fetch_ahead, helper, node_cache
from data_pipeline.stores.folders import node_folder
from tests.data_pipeline.tars import overwrite
from tests.fixtures.buckets import Bucket


@pytest.fixture
def tars(shard_folder: Path, tmp_path: Path) -> Path:
    """Two shards, nothing beside them."""
    folder = tmp_path / "tars"
    (folder / "more").mkdir(parents=True)
    shutil.copy(shard_folder / "000000.tar", folder / "000000.tar")
    shutil.copy(shard_folder / "000001.tar", folder / "more" / "000001.tar")
    return folder


def test_a_bucket_is_a_folder(bucket: Bucket, tars: Path, encoder: Any) -> None:
    url = bucket.upload(tars, "docs/v1")
    manifest = index_shards(url, source="tars", num_processes=1)
    assert manifest.fingerprint == index_shards(tars, num_processes=1).fingerprint
    published = {name.removeprefix("bucket/docs/v1/") for name in bucket.store.objects}
    local = {path.relative_to(tars).as_posix() for path in tars.rglob("*") if path.is_file()}
    assert published == local | {"etags.json"}
    for name in local:
        assert bucket.store.objects[f"bucket/docs/v1/{name}"] == (tars / name).read_bytes(), name
    measure_source(url, encoder, num_processes=2)
    measure_source(tars, encoder, num_processes=1)
    there, here = open_source("s", url, encoder), open_source("s", tars, encoder)
    assert there.fingerprint == here.fingerprint
    assert np.array_equal(there.measures, here.measures)
    assert [there.reader[i].messages for i in range(80)] == [here.reader[i].messages for i in range(80)]
    assert verify_folder(url, decode=True, num_processes=2) == []


def test_a_new_index_becomes_the_nodes_current_one_under_its_lock(
    bucket: Bucket, tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that looks for the manifest meanwhile must not put an older one in its place."""
    url, folder = bucket.upload(tars, "docs"), node_folder("s3://bucket/docs")
    adopt, held = node_cache._adopt, []

    def adopt_and_look(*arguments: Any) -> str:
        with (folder / ".lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(sorted(path.name for path in folder.rglob("*.index.jsonl")))
        return adopt(*arguments)

    monkeypatch.setattr(node_cache, "_adopt", adopt_and_look)
    index_shards(url, num_processes=1)
    assert held == [["000000.index.jsonl", "000001.index.jsonl"]]
    assert not list((folder / node_cache.MADE).rglob("*.jsonl"))
    assert len(SourceReader(url)) == 80


def test_a_second_node_measures_nothing_a_warm_start_asks_twice_and_a_third_node_indexes_by_a_list(
    bucket: Bucket, shard_folder: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    measure_source(url, encoder, num_processes=1)
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    bucket.store.log.clear()
    assert len(open_source("s", url, encoder)) == 300
    assert bucket.requests("PUT") == bucket.requests("LIST") == bucket.requests("GET", ".tar") == 0
    forget_looks(tmp_path / "node-2")
    bucket.store.log.clear()
    assert len(open_source("s", url, encoder)) == 300
    assert bucket.requests("GET") == len(bucket.store.log) == 2
    bucket.store.log.clear()
    assert len(open_source("s", url, encoder)) == 300
    assert bucket.store.log == []
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-3"))
    bucket.faults.counts.clear()
    bucket.faults.latency = 0.2
    index_shards(url, num_processes=1)
    assert (bucket.requests("LIST"), bucket.requests("HEAD"), bucket.requests("GET", ".tar")) == (1, 0, 0)
    assert bucket.requests("GET", ".index.jsonl") == 8
    assert bucket.faults.counts["at once"] >= 4


def test_texts_are_read_many_at_a_time(bucket: Bucket, shard_folder: Path, encoder: Any) -> None:
    """Neighbours in one request, and the next block while one is used; every record as from disk."""
    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    there, here = SourceReader(url), SourceReader(shard_folder)
    bucket.store.log.clear()
    records = there.records(range(300))
    first = next(records)
    while bucket.requests("GET", ".tar") < 2:  # of both blocks, before the second record is asked for
        time.sleep(0.01)
    assert [first, *records] == [here.record(number) for number in range(300)]
    assert 2 <= bucket.requests("GET", ".tar") <= 30
    assert next(iter(there.records([299]))) == here.record(299)
    assert list(there.records([])) == []


@pytest.mark.parametrize("encodes", [True, False])
def test_samples_are_verified_many_at_a_time(
    bucket: Bucket, records: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encodes: bool
) -> None:
    """The lines of a local folder, in their order, also where samples cannot be used; also from a web server."""
    folder = tmp_path / "docs"
    write_shards(records(60), folder, samples_per_shard=30, num_processes=1)
    reader = SourceReader(folder)
    for number in (4, 31):
        overwrite(folder / reader.entry(number).shard, reader.entry(number).members["0.png"][0], b"#")
    overwrite(folder / reader.entry(7).shard, reader.entry(7).members["json"][0], b"#")
    readings = [Reading(encoder=encoder)] if encodes else []
    url, options = bucket.upload(folder, "docs"), {"decode": True, "readings": readings, "num_processes": 1}
    lines = verify_folder(folder, **options)
    assert [line.partition(": member")[0] for line in lines] == [
        f"00000{number // 30}.tar: sample s{number:05d}" for number in (4, 7, 31)
    ]
    assert verify_folder(f"{bucket.endpoint}/bucket/docs", **options) == lines
    assert bucket.requests("GET", ".tar") < 30
    monkeypatch.setattr(fetch_ahead, "MERGED_BYTES", 4096)
    bucket.faults.latency = 0.1
    bucket.faults.counts.clear()
    assert verify_folder(url, **options) == lines
    assert bucket.faults.counts["at once"] >= 3


def test_a_bucket_that_is_only_read_keeps_its_index_on_the_node(
    bucket: Bucket, tars: Path, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = bucket.upload(tars, "docs")
    bucket.store.read_only = True
    index_shards(url, num_processes=1)
    measure_source(url, encoder, num_processes=1)
    assert len(open_source("s", url, encoder)) == 80
    assert "cannot be written: its index and sample lengths are kept in" in caplog.text
    assert not any(name.endswith((".json", ".npy")) for name in bucket.store.objects)


def test_a_bucket_that_is_only_read_is_read_once(
    bucket: Bucket, tars: Path, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A warm start asks for etags.json and manifest.json; when a shard is replaced the others keep their index."""
    url = bucket.upload(tars, "docs")
    bucket.store.read_only = True
    for first in ("s00000", "s00040"):
        index_shards(url, num_processes=1)
        measure_source(url, encoder, num_processes=1)
        forget_looks(node_folder(url))
        bucket.store.log.clear()
        source = open_source("s", url, encoder)
        assert [source.reader.entry(i).key for i in (0, 79)] == [first, "s00079"]
        assert bucket.store.log == [("GET", f"bucket/docs/{name}") for name in ("etags.json", "manifest.json")]
        bucket.store.objects["bucket/docs/000000.tar"] = bucket.store.objects["bucket/docs/more/000001.tar"]
        forget_looks(node_folder(url))
    assert "made anew" not in caplog.text


def forget_looks(cache: Path) -> None:
    """As if the manifest had been looked for long ago."""
    for current in cache.rglob("current.json"):
        current.write_text(json.dumps(json.loads(current.read_text()) | {"checked": 0.0}))


@pytest.mark.parametrize("etags", [True, False])
def test_an_index_made_here_outlives_the_old_one_of_a_bucket_that_is_only_read(
    bucket: Bucket, tars: Path, monkeypatch: pytest.MonkeyPatch, etags: bool
) -> None:
    monkeypatch.setattr(node_cache, "FRESH_SECONDS", 0.0)
    bucket.store.preconditions = etags
    url = bucket.upload(tars, "docs")
    old = index_shards(url, num_processes=1)
    bucket.store.objects["bucket/docs/000000.tar"] = bucket.store.objects["bucket/docs/more/000001.tar"]
    bucket.store.read_only = True
    new = index_shards(url, num_processes=1)
    assert load_manifest(open_storage(url)).fingerprint == new.fingerprint != old.fingerprint
    assert SourceReader(url)[0].key == "s00040"
    theirs = bucket.store.objects["bucket/docs/manifest.json"]
    bucket.store.objects["bucket/docs/manifest.json"] = theirs.replace(b'"docs"', b'"another"')
    assert load_manifest(open_storage(url)).source == "another"
    del bucket.store.objects["bucket/docs/manifest.json"]
    with pytest.raises(LoadError, match="no manifest"):
        load_manifest(open_storage(url))


def test_only_what_is_new_is_indexed_again(bucket: Bucket, tars: Path) -> None:
    url = bucket.upload(tars, "docs")
    first = index_shards(url, num_processes=1)
    for listed, heads in {"{}": 0, "{:.33}": 0, "other-{}": 2}.items():  # as S3, without a quote, another one
        bucket.store.listed_etag = listed
        bucket.store.log.clear()
        again = index_shards(url, num_processes=1)
        assert again == first
        assert bucket.requests("GET") == 0
        assert (bucket.requests("LIST"), bucket.requests("HEAD")) == (1, heads)
    assert again.etags == {
        "000000.tar": bucket.etag("docs/000000.tar"),
        "more/000001.tar": bucket.etag("docs/more/000001.tar"),
    }
    bucket.store.objects["bucket/docs/000000.tar"] = (tars / "more" / "000001.tar").read_bytes()
    changed = index_shards(url, num_processes=1)
    assert bucket.requests("GET", "more/000001.tar") == 0
    assert bucket.requests("GET", "docs/000000.tar") > 0
    assert changed.fingerprint != first.fingerprint
    assert SourceReader(url)[0].key == "s00040"


@pytest.mark.parametrize("read_only", [True, False])
def test_an_index_that_was_interrupted_goes_on(
    bucket: Bucket, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """The second shard is damaged at first. Where the bucket can be written another node may go on."""
    url = bucket.upload(tars, "docs")
    bucket.store.times = dict.fromkeys(bucket.store.objects, time.time() - 5)
    bucket.store.read_only = read_only
    whole = bucket.store.objects["bucket/docs/more/000001.tar"]
    bucket.store.objects["bucket/docs/more/000001.tar"] = whole[:5000]
    with pytest.raises(DataError, match=r"000001\.tar"):
        index_shards(url, num_processes=1)
    bucket.store.objects["bucket/docs/more/000001.tar"] = whole
    if not read_only:
        monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    bucket.store.log.clear()
    assert index_shards(url, num_processes=1).fingerprint == index_shards(tars, num_processes=1).fingerprint
    assert bucket.requests("GET", "000000.tar") == 0
    assert SourceReader(url)[3].key == "s00003"


def test_an_unfinished_index_of_a_shard_that_was_replaced_is_made_anew(bucket: Bucket, tars: Path) -> None:
    url = bucket.upload(tars, "docs")
    whole = bucket.store.objects["bucket/docs/more/000001.tar"]
    bucket.store.objects["bucket/docs/more/000001.tar"] = whole[:5000]
    with pytest.raises(DataError, match=r"000001\.tar"):
        index_shards(url, num_processes=1)
    bucket.store.objects["bucket/docs/more/000001.tar"] = whole
    bucket.store.objects["bucket/docs/000000.tar"] = whole
    bucket.store.times["bucket/docs/000000.tar"] = time.time() + 5
    index_shards(url, num_processes=1)
    assert SourceReader(url)[0].key == "s00040"


def test_an_index_that_is_gone_is_made_again(
    bucket: Bucket, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.upload(tars, "docs")
    first = index_shards(url, num_processes=1)
    whole = bucket.store.objects.pop("bucket/docs/000000.index.jsonl")
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    assert index_shards(url, num_processes=1) == first
    assert bucket.store.objects["bucket/docs/000000.index.jsonl"] == whole


@pytest.mark.parametrize("same_size", [True, False])
def test_a_replaced_shard_is_named(bucket: Bucket, tars: Path, same_size: bool) -> None:
    url = bucket.upload(tars, "docs")
    index_shards(url, num_processes=1)
    reader = SourceReader(url)
    data = bucket.store.objects["bucket/docs/000000.tar"]
    bucket.store.objects["bucket/docs/000000.tar"] = data[::-1] if same_size else data + bytes(10240)
    with pytest.raises(LoadError, match=r"s3://bucket/docs/000000\.tar was replaced since it was indexed .* now"):
        reader[0]


def test_a_store_without_preconditions_is_seen_by_size_and_checksum(bucket: Bucket, tars: Path) -> None:
    url = bucket.upload(tars, "docs")
    index_shards(url, num_processes=1)
    bucket.store.preconditions = False
    data = bucket.store.objects["bucket/docs/000000.tar"]
    bucket.store.objects["bucket/docs/000000.tar"] = data + bytes(10240)
    with pytest.raises(LoadError, match="was replaced since it was indexed"):
        SourceReader(url)[0]


def test_a_copied_folder_drops_its_pins(bucket: Bucket, tars: Path) -> None:
    index_shards(bucket.upload(tars, "docs"), num_processes=1)
    assert len(load_manifest(open_storage("s3://bucket/docs")).etags) == 2
    for name, data in list(bucket.store.objects.items()):
        bucket.store.objects[name.replace("/docs/", "/copy/")] = data
    assert load_manifest(open_storage("s3://bucket/copy")).etags == {}
    assert SourceReader("s3://bucket/copy")[79].key == SourceReader("s3://bucket/docs")[79].key


def test_errors_name_the_way_out_and_no_secret(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LoadError, match=r"s3://bucket/none: no manifest.json, .*; run `alignvlm data index s3:"):
        load_manifest(open_storage("s3://bucket/none"))
    with pytest.raises(DataError, match=r"no .tar shards here"):
        index_shards("s3://bucket/none")
    with pytest.raises(DataError, match="leaves its folder"):
        open_storage("s3://bucket/none").read("../other")
    with pytest.raises(LoadError, match=r"s3://bucket/none: no manifest.json, .*; run `alignvlm data index s3:"):
        load_manifest(open_storage("S3://bucket/none/"))
    with pytest.raises(DataError, match=r"unknown scheme: did you mean 's3'"):
        open_storage("s3n://bucket/x")
    monkeypatch.setattr(bucket.store, "answer", lambda *_: (403, {}, b"<Code>AccessDenied</Code>"))
    with pytest.raises(LoadError, match=r"access is denied .* looked for AWS_ACCESS_KEY_ID") as caught:
        open_storage("S3://bucket/none").read("x")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value) + "".join(capfd.readouterr())
    for status, code, meaning in ((400, "ExpiredToken", "credentials have expired"), (403, "NoAccess", "is denied")):
        body = f"<Error><Code>{code}</Code><Token-0>geheim-987</Token-0></Error>".encode()  # as S3 repeats it
        monkeypatch.setattr(bucket.store, "answer", lambda *_, answer=(status, {}, body): answer)
        for ask in (lambda: open_storage("s3://bucket/none").read("x"), lambda: index_shards("s3://bucket/none")):
            with pytest.raises(LoadError, match=rf"{meaning}.* \({code}\)\); looked for AWS_ACCESS_KEY_ID") as caught:
                ask()
            assert "geheim" not in str(caught.value) + "".join(capfd.readouterr())
    monkeypatch.setattr(bucket.store, "answer", lambda *_: (301, {}, b"<Code>PermanentRedirect</Code>"))
    with pytest.raises(LoadError, match="another region; let AWS_REGION name it"):
        open_storage("s3://bucket/none").read("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "0")
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    with pytest.raises(UnreachableError, match="error sending request: ConnectionRefused; no answer for"):
        open_storage("s3://bucket/none").read("x")


def test_the_helper_ends_and_starts_again(bucket: Bucket) -> None:
    bucket.store.objects["bucket/a/x"] = b"1"
    storage = open_storage("s3://bucket/a")
    assert storage.read("x") == b"1"
    assert helper._helper is not None
    helper._helper.process.kill()
    helper._helper.process.wait()
    with suppress(LoadError):  # a request that was on its way may be lost
        storage.read("x")
    assert storage.read("x") == b"1"

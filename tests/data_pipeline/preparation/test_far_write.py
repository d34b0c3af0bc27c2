"""Shards written to a bucket, and rows read from one: byte for byte what a local folder gets from local files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError
from data_pipeline.importers.records import open_dataset
from data_pipeline.preparation import write
from data_pipeline.preparation.engines import Local
from data_pipeline.shards import writer
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.folders import node_folder
from data_pipeline.stores.requests import Upload
from tests.data_pipeline.preparation.test_write import row
from tests.data_pipeline.published import docdownstream, llava_pretrain, parquet, rows_of, save_to_disk
from tests.fixtures.buckets import Bucket
from tests.fixtures.command import Command
from tests.stores.fake_hub import FakeHub

ONE = ("--processes", "1")
FIVE = ("--samples-per-shard", "5", *ONE)


@pytest.fixture
def source(bucket: Bucket, tmp_path: Path) -> Path:
    """20 rows in two parquet files, two of them unusable; also at s3://bucket/in."""
    for name in ("a/train-0", "a-b/train-1"):  # which come first by folders, and last by letters
        parquet(tmp_path / "in" / f"{name}.parquet", [row(i) for i in range(10)], group=5)
    bucket.upload(tmp_path / "in", "in")
    return tmp_path / "in"


def inside(bucket: Bucket, folder: str) -> dict[str, bytes]:
    found = {name.removeprefix(f"bucket/{folder}/"): data for name, data in bucket.store.objects.items()}
    return {name: data for name, data in found.items() if not name.startswith("bucket/")}


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_jobs_of_two_nodes_write_what_one_process_writes_on_disk(
    bucket: Bucket, source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("data", "write", tmp_path / "here" / "mine", "--from", source, *FIVE)
    url = "s3://bucket/out/mine"
    words = ("data", "write", url, "--from", "s3://bucket/in", *FIVE)
    assert f"{url}: 20 rows would be written as 4 shards" in command(*words, "--dry-run")
    assert inside(bucket, "out") == {}
    assert "task 1 of 2 wrote 2 shards" in command(*words, "--tasks", "2", "--task", "1")
    assert f"{url}: 2 of 4 shards are missing (000000.tar is the first)" in command(*words, "--finish", code=2)
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    assert "task 0 of 2 wrote 2 shards" in command(*words, "--tasks", "2", "--task", "0")
    before = bucket.requests("PUT")
    assert "task 0 of 2 wrote 0 shards" in command(*words, "--tasks", "2", "--task", "0")
    assert bucket.requests("PUT") == before
    said = command(*words, "--finish")
    assert f"{url}: 18 samples in 4 shards" in said
    assert "2 x answer 0 is empty" in said
    there = inside(bucket, "out/mine")
    assert [path for method, path in bucket.store.log if method == "PUT"][-1] == "bucket/out/mine/manifest.json"
    assert there.pop("etags.json")
    assert there == local(tmp_path / "here" / "mine")
    assert len(load_manifest(open_storage(url)).etags) == 4
    assert not list((node_folder(url)).rglob("*.tar"))
    assert SourceReader(url)[9].key == SourceReader(tmp_path / "here" / "mine")[9].key
    before = bucket.requests("PUT")
    assert "18 samples in 4 shards" in command(*words)
    assert bucket.requests("PUT") == before
    assert "of other arguments" in command(*words, "prompt=hm", code=2)


def die_in_upload(plan: Any, url: str) -> None:
    submit = helper.submit

    def stop(request: Any) -> Future[Any]:
        if isinstance(request, Upload) and request.files[-1][0] == "000001.index.jsonl":
            submit(replace(request, files=request.files[:-1])).result()
            os.kill(os.getpid(), signal.SIGKILL)
        return submit(request)

    helper.submit = stop
    write.write_missing(plan, url, engine=Local(1))


def test_a_kill_in_an_upload_costs_that_shard(bucket: Bucket, source: Path) -> None:
    url, dataset = "s3://bucket/out", open_dataset(source)
    plan = write.plan_folder(dataset, url, 5, num_processes=1)
    process = multiprocessing.get_context("spawn").Process(target=die_in_upload, args=(plan, url))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = inside(bucket, "out")
    assert "000001.tar" in there
    assert "000001.index.jsonl" not in there
    bucket.store.log.clear()
    assert write.write_dataset(dataset, url, samples_per_shard=5, engine=Local(1)).manifest.num_samples == 18
    assert bucket.requests("PUT", "out/000000.tar") == 0
    assert bucket.requests("PUT", "out/000001.tar") == 1
    assert not list(node_folder(url).rglob("*.tar"))
    assert verify_folder(url, decode=True, num_processes=1) == []


def test_own_records_and_generated_ones_go_to_a_bucket(
    bucket: Bucket, records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_shards(records(30), tmp_path / "here", samples_per_shard=10, num_processes=1)
    url, submit = "s3://bucket/docs/here", helper.submit

    gone: Future[Any] = Future()
    gone.set_exception(LoadError("the node is gone"))

    def fail(request: Any) -> Future[Any]:
        is_third = isinstance(request, Upload) and request.files[0][0] == "000002.tar"
        return gone if is_third else submit(request)

    monkeypatch.setattr(helper, "submit", fail)
    with pytest.raises(LoadError, match="the node is gone"):
        write_shards(records(30), url, samples_per_shard=10, num_processes=1)
    monkeypatch.setattr(helper, "submit", submit)
    with pytest.raises(LoadError, match="no manifest"):
        load_manifest(open_storage(url))
    with pytest.raises(DataError, match="holds other shards, which were not finished"):
        write_shards(records(31), url, samples_per_shard=10, num_processes=1)
    bucket.store.log.clear()
    assert write_shards(records(30), url, samples_per_shard=10, num_processes=1).fingerprint == made.fingerprint
    assert bucket.requests("PUT", "000000.tar") == 0
    there = inside(bucket, "docs/here")
    assert there.pop("etags.json")
    assert there == local(tmp_path / "here")
    assert len(load_manifest(open_storage(url)).etags) == 3
    assert not (node_folder(url) / writer._UPLOADING).exists()
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        write_shards(records(30), url, samples_per_shard=10, num_processes=1)


def test_a_mark_that_is_not_json_hides_no_other_error(bucket: Bucket, records: Any) -> None:
    storage = open_storage("s3://bucket/odd")
    storage.write("etags.json", b"[")
    with pytest.raises(DataError, match="not a list of messages"):
        write_shards([*records(2), {"key": "a.b", "messages": []}], "s3://bucket/odd", num_processes=1)
    assert inside(bucket, "odd") == {"etags.json": b"["}
    assert write_shards(records(2), "s3://bucket/odd", num_processes=1).num_samples == 2


def test_shards_are_uploaded_several_at_a_time_each_before_its_index(bucket: Bucket, records: Any) -> None:
    bucket.faults.latency = 0.2
    write_shards(records(60), "s3://bucket/mine", samples_per_shard=10, num_processes=1)
    assert bucket.faults.counts["at once"] >= 4
    put = [path.removeprefix("bucket/mine/") for method, path in bucket.store.log if method == "PUT"]
    for number in range(6):
        assert put.index(f"{number:06d}.tar") < put.index(f"{number:06d}.index.jsonl")
    assert put[-2:] == ["etags.json", "manifest.json"]


def test_records_that_cannot_be_written_leave_nothing(bucket: Bucket, tmp_path: Path, command: Command) -> None:
    """Where nothing may be deleted, the mark that is left is no obstacle to any way of writing."""
    rows = docdownstream(tmp_path / "in")
    (tmp_path / "bad.jsonl").write_text("no JSON")
    for deletes in (True, False):
        bucket.store.deletes = deletes
        command("data", "write", "s3://bucket/mine", "--from-jsonl", tmp_path / "bad.jsonl", code=2)
        assert set(inside(bucket, "mine")) == (set() if deletes else {"etags.json"})
        assert not [path for path in node_folder("s3://bucket/mine").rglob("*") if path.suffix != ".lock"]
    assert "s3://bucket/mine: " in command("data", "write", "s3://bucket/mine", "--from", rows, "--processes", "1")
    command("data", "write", "s3://bucket/too", "--from-jsonl", tmp_path / "bad.jsonl", code=2)
    write_shards([{"key": "a", "messages": [{"role": "user", "content": "b"}]}], "s3://bucket/too")
    assert len(SourceReader("s3://bucket/too")) == 1


def test_a_folder_that_is_written_anew_has_no_index_of_the_old_one(
    bucket: Bucket, records: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = "s3://bucket/mine"
    for prefix in ("a", "b"):
        bucket.store.objects.clear()
        renamed = ({**record, "key": f"{prefix}{record['key']}"} for record in records(20))
        write_shards(renamed, url, samples_per_shard=10, num_processes=1)
        bucket.store.log.clear()
        reader = SourceReader(url)
        assert [reader.entry(i).key for i in (0, 19)] == [f"{prefix}s00000", f"{prefix}s00019"]
        assert bucket.requests("GET", ".tar") == 0
    assert "made anew" not in caplog.text


def test_a_bucket_that_is_only_read_says_so_before_anything_is_made(bucket: Bucket) -> None:
    bucket.store.read_only = True
    with pytest.raises(DataError, match="access is denied"):
        write_shards(iter(lambda: pytest.fail("a record was asked for"), None), "s3://bucket/mine")


PUBLISHED = {
    "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": "LLaVA-Pretrain/images.zip",
    "DocDownstream/train.jsonl": "",
    "Cauldron/train-0.parquet": "",
}
"""File with rows -> its archive of images; without one they lie beside it, or in it."""


def test_rows_and_images_are_read_where_they_lie(bucket: Bucket, tmp_path: Path, command: Command) -> None:
    llava_pretrain(tmp_path / "LLaVA-Pretrain")
    rows = docdownstream(tmp_path / "DocDownstream")
    parquet(tmp_path / "Cauldron" / "train-0.parquet", rows_of("finevision"))
    bucket.upload(tmp_path, "in")
    here, far = tmp_path / "here", tmp_path / "far"
    for number, (file, images) in enumerate(PUBLISHED.items()):
        for place, out in ((str(tmp_path), here), ("s3://bucket/in", far)):
            more = ("--images", f"{place}/{images}") if images else ()
            command("data", "write", out / f"{number}", "--from", f"{place}/{file}", *more, "--processes", "1")
        assert local(far / f"{number}") == local(here / f"{number}"), file
    own = [{**row, "image": f"./{row['image'][0]}"} for row in map(json.loads, rows.read_text().splitlines())]
    rows.with_name("own.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in own).replace("<|image|>", "<image>")
    )
    bucket.upload(tmp_path / "DocDownstream", "in/DocDownstream")
    command("data", "write", here / "own", "--from-jsonl", rows.with_name("own.jsonl"))
    command("data", "write", far / "own", "--from-jsonl", "s3://bucket/in/DocDownstream/own.jsonl")
    assert local(far / "own") == local(here / "own")
    bucket.store.objects.pop("bucket/in/DocDownstream/imgs/DUE_Benchmark/DocVQA/pngs/1.jpg")
    said = command("data", "write", far / "less", "--from", "s3://bucket/in/DocDownstream/train.jsonl")
    assert "1 x image 'imgs/DUE_Benchmark/DocVQA/pngs/1.jpg' of DocDownstream: no such file" in said


def test_rows_are_read_from_web_servers_and_the_hub(
    bucket: Bucket, hub: FakeHub, tmp_path: Path, command: Command
) -> None:
    llava_pretrain(tmp_path / "in" / "LLaVA-Pretrain")
    docdownstream(tmp_path / "in" / "DocDownstream")
    parquet(tmp_path / "in" / "Cauldron" / "train-0.parquet", rows_of("finevision"))
    bucket.upload(tmp_path / "in", "in")
    files = [path for path in (tmp_path / "in").rglob("*") if path.is_file()]
    hub.commit({path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files})
    web, branch = f"{bucket.endpoint}/bucket/in", "hf://datasets/org/name/in"
    for number, (file, images) in enumerate(PUBLISHED.items()):
        for place, out in ((str(tmp_path / "in"), "here"), (web, "web"), (branch, "hub")):
            more = ("--images", f"{place}/{images}") if images else ()
            command("data", "write", tmp_path / out / f"{number}", "--from", f"{place}/{file}", *more, *ONE)
            assert local(tmp_path / out / f"{number}") == local(tmp_path / "here" / f"{number}"), (place, file)
    command("data", "write", tmp_path / "hub" / "all", "--from", f"{branch}/Cauldron", *ONE)
    assert len(SourceReader(tmp_path / "hub" / "all")) == len(SourceReader(tmp_path / "here" / "2"))
    said = command("data", "write", tmp_path / "web" / "all", "--from", f"{web}/Cauldron", *ONE, code=2)
    assert f"{web}/Cauldron cannot be listed; name a file" in said


def test_what_cannot_be_is_one_line(bucket: Bucket, source: Path, tmp_path: Path, command: Command) -> None:
    save_to_disk(tmp_path / "arrow", rows_of("finevision"))
    bucket.upload(tmp_path / "arrow", "arrow")
    bucket.store.objects["bucket/taken/x.tar"] = b"of somebody else"

    def said(*words: str | Path) -> str:
        line = command("data", "write", *words, "--processes", "1", code=2)
        assert line.count("\n") == 1
        return line

    assert "Arrow files are read from disk only" in said(tmp_path / "o", "--from", "s3://bucket/arrow")
    assert "s3://bucket/none: no such file or folder" in said(tmp_path / "o", "--from", "s3://bucket/none")
    assert "s3://bucket/taken is not empty" in said("s3://bucket/taken", "--from", source)
    assert "s3://bucket/taken is not empty" in said("s3://bucket/taken", "--from-jsonl", docdownstream(tmp_path / "d"))
    assert "'s3://' names no bucket" in said("s3://", "--from", source)
    assert "HTTP servers are only read" in said("https://127.0.0.1:1/x", "--from", source)
    assert "the Hub is only read" in said("hf://datasets/org/name", "--from", source)
    shutil.rmtree(source / "a")
    bucket.store.objects.pop("bucket/in/a/train-0.parquet")
    bucket.store.objects["bucket/in/a-b/train-1.parquet"] += b"PAR1"
    assert "train-1.parquet" in said("s3://bucket/o", "--from", "s3://bucket/in")

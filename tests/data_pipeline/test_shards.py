"""Shards: written as WebDataset, read back by it and by us; foreign ones indexed, damage found, unsafe input
refused.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.importers.prepare import FolderSpec, prepare_folders, write_generated
from data_pipeline.samples.decoding import decode_member
from data_pipeline.samples.images import decode_image, image_members
from data_pipeline.samples.schema import SampleError, normalise_messages
from data_pipeline.shards import storage as storage_module
from data_pipeline.shards.index import index_name, index_shards, load_manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
from data_pipeline.shards.writer import write_shards


def picture(
    width: int = 30, height: int = 20, format: str = "JPEG", colour: Any = (200, 10, 10), **options: Any
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_round_trip(reader: SourceReader, records: Any) -> None:
    assert len(reader) == 300
    for i, record in enumerate(records(300)):
        sample = reader[i]
        assert sample.key == record["key"]
        assert sample.meta == {"task": "count"}
        assert sample.messages == normalise_messages(record["messages"], len(record["images"]))
        assert [list(image.getdata()) for image in sample.images] == [
            list(image.getdata()) for image in record["images"]
        ]
    _, sizes, meta = reader.record(2)
    assert sizes == [(12, 12), (12, 12)]
    assert meta["task"] == "count"
    assert len(list(reader.messages())) == 300


def test_a_plain_webdataset_pipeline_reads_the_shards(shard_folder: Path) -> None:
    urls = sorted(str(path) for path in shard_folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"s{i:05d}" for i in range(300)]
    assert samples[1]["json"]["task"] == "count"
    assert samples[1]["0.png"].size == (11, 12)


def test_the_same_records_have_the_same_fingerprint(records: Any, tmp_path: Path) -> None:
    prints = [write_shards(records(30), tmp_path / name, source="s").fingerprint for name in ("a", "b")]
    other = write_shards(records(31), tmp_path / "c", source="s").fingerprint
    assert prints[0] == prints[1] != other


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


def test_verify_finds_every_kind_of_damage(tmp_path: Path, records: Any) -> None:
    folder = tmp_path / "damaged"
    write_shards(records(60), folder, samples_per_shard=10, num_processes=1)
    assert verify_folder(folder, decode=True, num_processes=1) == []
    entry = SourceReader(folder).entry(2)
    overwrite(folder / "000000.tar", entry.members["json"][0], b"#")
    os.truncate(folder / "000001.tar", 6000)
    (folder / "000002.tar").unlink()
    (folder / index_name("000003.tar")).write_text("{}\n")
    write_tar(folder / "extra.tar", [("a.txt", b"x")])
    problems = verify_folder(folder, num_processes=2)
    assert any(f"sample {entry.key}: content changed" in line for line in problems)
    for shard in ("000001", "000002", "000003", "extra"):
        assert any(line.startswith(shard) for line in problems), shard
    assert not any(line.startswith(("000004", "000005")) for line in problems)
    with pytest.raises(SampleError, match="checksum"):
        SourceReader(folder)[2]


def test_images_that_cannot_be_used_are_named_when_measured(tmp_path: Path, encoder: Any) -> None:
    folder = tmp_path / "bad"
    chat = json.dumps(
        {"messages": [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": "a"}]}
    ).encode()
    members = []
    for key, image in (("good", picture()), ("broken", b"no image"), ("none", None), ("cut", picture(400, 400)[:900])):
        members.append((f"{key}.json", chat))
        if image is not None:
            members.append((f"{key}.0.jpg", image))
    members.append(("list.json", b"[1]"))
    members.append(("text.json", b"{"))
    write_tar(folder / "0.tar", members)
    index_shards(folder, num_processes=1)
    measure_source(folder, encoder, num_processes=1)
    source = open_source("bad", folder, encoder)
    assert [bad.key for bad in source.unusable] == ["broken", "none", "list", "text"]
    assert source.measures[:, 0].astype(bool).tolist() == [True, False, False, True, False, False]
    with pytest.raises(SampleError, match="truncated"):
        source.reader[3]


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(bomb, "PNG")
    with pytest.raises(SampleError, match="pixels"):
        decode_image(bomb.getvalue())
    folder = tmp_path / "bomb"
    write_tar(folder / "0.tar", [("a.png", bomb.getvalue()), ("a.txt", b"black")])
    index_shards(folder, num_processes=1)
    with pytest.raises(SampleError, match="pixels"):
        SourceReader(folder).record(0)


def test_images_come_upright_opaque_and_eight_bit() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(picture(30, 20, exif=exif)).size == (20, 30)
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x8000, np.uint16)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)
    postscript = io.BytesIO()
    Image.new("RGB", (4, 4)).save(postscript, "EPS")
    with pytest.raises(SampleError):
        decode_image(postscript.getvalue())


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "pwned",)

    for extension in ("pkl", "pickle", "pyd", "pth", "npy"):
        with pytest.raises(SampleError):
            decode_member(extension, pickle.dumps(Trap()))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt"])
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"x")])
    with pytest.raises(DataError, match="leaves its folder"):
        index_shards(tmp_path, num_processes=1)


def test_storage_refuses_shells_and_names_what_comes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shell"):
        open_storage("pipe:cat /etc/passwd")
    for url in ("s3://bucket/x", "https://host/x"):
        with pytest.raises(DataError, match="to come"):
            open_storage(url)
    (tmp_path / "x y").mkdir()
    (tmp_path / "x y" / "a.txt").write_text("hello")
    for url in (str(tmp_path / "x y"), f"file://{tmp_path}/x%20y"):
        storage = open_storage(url)
        assert storage.read_range("a.txt", 1, 3) == b"ell"
        assert list(storage.list(".txt")) == ["a.txt"]
        with pytest.raises(DataError, match="leaves"):
            storage.read("../secret")


def test_reads_that_fail_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", (0, 0))
    (tmp_path / "a.txt").write_text("hello")
    storage, failures, read = open_storage(tmp_path), [errno.EIO, errno.ESTALE], os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.read_range("a.txt", 1, 3) == b"ell"
    said = caplog.text
    assert "a.txt cannot be read: Input/output error; trying again in 0 s" in said
    assert "Stale file handle" in said
    failures += [errno.EIO] * 3
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Input/output error"):
        storage.read_range("a.txt", 1, 3)
    with pytest.raises(DataError, match=r"a\.txt has 5 bytes, but 33 were indexed"):
        storage.read_range("a.txt", 3, 30)
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        storage.read_range("b.txt", 3, 30)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"key": "a.b", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "../a", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "a", "messages": []}, "not a list"),
        ({"key": "a", "messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"key": "a", "messages": [{"role": "user", "content": "<image>"}]}, "1 image placeholder"),
        ({"key": "a", "messages": [{"role": "user", "content": "<image>"}], "images": [b"text"]}, "not an image"),
        ({"key": "a", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither an image nor a text"),
    ],
)
def test_invalid_records_are_refused_and_leave_nothing(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        write_shards([record], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_writing_twice_or_over_something_is_refused(tmp_path: Path, records: Any) -> None:
    with pytest.raises(DataError, match="comes twice"):
        write_shards([*records(3), *records(1)], tmp_path / "out")
    write_shards(records(3), tmp_path / "out", num_processes=1)
    with pytest.raises(DataError, match="not empty"):
        write_shards(records(3), tmp_path / "out")


def test_edited_manifests_are_noticed(tmp_path: Path, records: Any) -> None:
    write_shards(records(3), tmp_path / "out", num_processes=1)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"000000.tar", 3', '"000000.tar", 2'))
    with pytest.raises(DataError, match="edited"):
        load_manifest(open_storage(tmp_path / "out"))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        SourceReader(tmp_path)


def test_generated_sources_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: Any) -> None:
    calls = []

    def fake(name: str, **args: Any) -> Any:
        calls.append(name)
        return records(args["num_samples"])

    monkeypatch.setattr("data_pipeline.generators.generate", fake)
    (tmp_path / "g.partial").mkdir()
    (tmp_path / "g.partial" / "000000.tar").write_text("left by a crash")
    for _ in range(2):
        manifest = write_generated("g", tmp_path / "g", "letters", {"num_samples": 5})
    assert calls == ["letters"]
    assert manifest.num_samples == 5
    assert not (tmp_path / "g.partial").exists()
    with pytest.raises(DataError, match="was made with"):
        write_generated("g", tmp_path / "g", "letters", {"num_samples": 6})
    specs = [FolderSpec(name, str(tmp_path / name), "letters", {"num_samples": 4}) for name in ("h", "i")]
    prepare_folders([*specs, FolderSpec("g", str(tmp_path / "g"))])
    assert len(SourceReader(tmp_path / "i")) == 4
    with pytest.raises(DataError, match="no tar shards"):
        prepare_folders([FolderSpec("j", str(tmp_path / "j"))])


def test_images_are_ordered_by_number() -> None:
    assert image_members(["10.png", "2.jpg", "json", "png", "seg.png", "0.webp"]) == [
        "png",
        "0.webp",
        "2.jpg",
        "10.png",
    ]

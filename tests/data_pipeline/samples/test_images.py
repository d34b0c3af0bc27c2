"""Images: upright, opaque, eight bits, in order, whichever way they come; what cannot be used is one bad sample."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from data_pipeline.samples.images import FORMATS, MAX_IMAGE_BYTES, decode_image, image_members, image_size
from data_pipeline.samples.jpeg_header import plain_jpeg_size
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import to_members
from tests.data_pipeline.tars import write_tar
from tests.fixtures.zoo import PAGE, bomb, exif, png, save, tiff, zoo

ROOT = Path(__file__).resolve().parents[3]
ZOO = zoo()
PNG = save(PAGE, "PNG")


@pytest.mark.parametrize("name", ZOO)
def test_an_image_has_the_same_pixels_whichever_way_it_comes(tmp_path: Path, name: str) -> None:
    data, expected = ZOO[name]
    (tmp_path / name).write_bytes(data)
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)
    assert image_size(data) == decoded.size
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    sources = [tmp_path / name, str(tmp_path / name), Image.open(tmp_path / name), loaded, decoded]
    if name not in ("12.tif", "16-white-is-zero.tif"):  # a copy has lost what says so
        sources.append(loaded.copy())
    for source in sources:
        assert np.array_equal(np.asarray(decode_image(source)), expected)


@pytest.mark.parametrize(("kind", "value"), [(2, "text"), (3, (5, 6)), (4, 5)])
def test_metadata_of_a_wrong_type_says_nothing(kind: int, value: Any) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = kind, value  # XMP, which is bytes
    data = save(PAGE, "TIFF", tiffinfo=tags)
    assert image_size(data) == (10, 6)
    assert np.array_equal(np.asarray(decode_image(data)), PAGE)


def test_an_image_of_a_users_program_is_not_changed() -> None:
    image = Image.open(io.BytesIO(save(PAGE, "JPEG", exif=exif(6), icc_profile=b"profile")))
    decoded = decode_image(image)
    assert image.size[::-1] == decoded.size
    assert image.getexif()[0x0112] == 6
    assert image.info["icc_profile"] == b"profile"
    assert decoded.info == {}
    page = Image.fromarray(PAGE)
    assert decode_image(page) is page


def test_pil_images_are_written_with_the_pixels_that_training_sees() -> None:
    for name in ("orientation-6.jpg", "alpha.png", "16.png", "cmyk.tif"):
        data, expected = ZOO[name]
        record = {"key": "a", "messages": [{"role": "user", "content": "<image>"}], "images": [data]}
        record["images"] = [Image.open(io.BytesIO(data))]
        assert np.array_equal(np.asarray(decode_image(to_members(record)["0.png"])), expected)


def header_of(png_size: tuple[int, int]) -> bytes:
    return png(8, 2, PAGE, {}, {}).replace(struct.pack(">II", 10, 6), struct.pack(">II", *png_size))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image of the formats PNG, JPEG, WEBP, TIFF, BMP, GIF, PPM"),
        (b"no picture", "not an image of the formats PNG"),
        (save(PAGE, "EPS"), "not an image of the formats PNG"),
        (save(PAGE, "PDF"), "not an image of the formats PNG"),
        (PNG[:-30], "truncated|broken|cannot be decoded"),
        (save(PAGE, "JPEG")[:-60], "Truncated"),
        (bomb(11_000), "11000 x 11000 pixels; at most 100,000,000"),
        (bomb(20_000), "more than 100,000,000 pixels"),
        (b"P6 0 5 255\n", "cannot be decoded|0 x 5 pixels"),
        (b"GIF89a" + bytes(4) + PNG, "cannot be decoded|pixels"),
        (save(PAGE[..., 0].astype(np.float32), "TIFF"), "grey levels from 0.0 to .*, but black is 0 and white is 1"),
        (save(np.full((2, 2), np.nan, np.float32), "TIFF"), "grey levels from nan"),
        (save(np.full((2, 2), 70_000, np.int32), "TIFF"), "grey levels from 70000 to 70000, .* white is 65535"),
        (save(np.full((2, 2), -1, np.int32), "TIFF"), "grey levels from -1"),
        (tiff([64], 1, 3, PAGE.tobytes()), "not an image of the formats PNG"),
        (png(8, 2, PAGE, {b"zTXt": b"a\0\0" + zlib.compress(bytes(1 << 26))}, {}), "too large"),
    ],
)
def test_what_cannot_be_used_is_one_bad_sample(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_every_cut_and_every_flipped_byte_is_a_picture_or_a_bad_sample() -> None:
    rng = np.random.default_rng(0)
    for name in ("rgb.png", "orientation-6.jpg", "palette-hole.gif", "turned-lzw.tif", "pictures.mpo.jpg", "16.pgm"):
        data = ZOO[name][0]
        for position in rng.integers(0, len(data), 60).tolist():
            flipped = data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
            for damaged in (data[:position], flipped):
                for use in (decode_image, image_size):
                    with suppress(SampleError):
                        use(damaged)


def test_files_that_are_none(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "large.png": "268,435,457 bytes; at most 268,435,456",
        "pipe.png": "not a regular file",
        ".": "not a regular file",
        "missing.png": "No such file",
        "n" * 5000: "File name too long",
        "a\0b": "null",
    }.items():
        with pytest.raises(SampleError, match=reason):
            decode_image(tmp_path / name)


def test_an_image_opened_in_another_format_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(save(PAGE, "EPS")))
    monkeypatch.setattr(image, "load", lambda: pytest.fail("decoding starts Ghostscript"))
    with pytest.raises(SampleError, match="EPS images are not read, only PNG"):
        decode_image(image)
    assert "EPS" not in FORMATS


def test_images_are_opened_in_one_module_only() -> None:
    opening = re.compile(r"\bImage\.open\(|\bimread\(|\bload_image\(")
    files = [path for name in ("alignvlm", "data_pipeline", "examples") for path in (ROOT / name).rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in files if opening.search(path.read_text("utf-8"))]
    assert found == ["data_pipeline/samples/images.py"]


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    folder = tmp_path / "bomb"
    write_tar(folder / "0.tar", [("a.png", bomb(11_000)), ("a.txt", b"black")])
    index_shards(folder, num_processes=1)
    with pytest.raises(SampleError, match="pixels"):
        SourceReader(folder).record(0)


def test_images_are_ordered_by_number() -> None:
    assert image_members(["10.png", "2.jpg", "json", "png", "seg.png", "0.webp"]) == [
        "png",
        "0.webp",
        "2.jpg",
        "10.png",
    ]


def test_the_size_of_a_plain_jpeg_is_the_one_that_pil_finds() -> None:
    """Whatever a byte of its header says: None leaves the decision to PIL."""
    headers = [save(PAGE, "JPEG", quality=90), save(PAGE, "JPEG", progressive=True), save(PAGE[..., 0], "JPEG")]
    assert [plain_jpeg_size(memoryview(data)) for data in headers] == [(10, 6)] * 3
    assert plain_jpeg_size(save(PAGE, "JPEG", exif=exif(6))) is None
    found = 0
    for data in headers:
        end = data.index(b"\xff\xda") + 4
        small = [at for at in range(end) if at < 40 or data[at] == 0xFF or data[at - 1] == 0xFF or end - 300 < at]
        for at in small[:160]:
            for value in {0, 1, 0xC0, 0xDB, 0xE1, 0xFF, data[at] ^ 1, data[at] ^ 0x80}:
                other = data[:at] + bytes([value]) + data[at + 1 :]
                size = plain_jpeg_size(other)
                if size is not None:
                    assert image_size(other) == size, (at, value)
                    found += 1
        assert all(plain_jpeg_size(data[:length]) is None for length in range(end - 2))
    assert found > 500

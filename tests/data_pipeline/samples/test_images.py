"""Images: upright, opaque, eight bits, in order; bombs refused before they are decoded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.samples.images import decode_image, image_members
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from tests.data_pipeline.tars import picture, write_tar


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


def test_images_are_ordered_by_number() -> None:
    assert image_members(["10.png", "2.jpg", "json", "png", "seg.png", "0.webp"]) == [
        "png",
        "0.webp",
        "2.jpg",
        "10.png",
    ]

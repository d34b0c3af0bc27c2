"""Images from anywhere: the same pixels, whichever way they come, and one line where they cannot be read."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm.model.inputs.images import read_image, read_images
from data_pipeline.samples.images import decode_image
from tests.fixtures.zoo import save
from tests.tiny import picture
from tests.web import web_server

PAGE = picture(12, 7)
DATA = save(PAGE)
PIXELS = np.asarray(PAGE)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Serves the page at /page.png, sends /moved there, and knows nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/page.png": 200, "/moved": 302}.get(self.path, 404)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/page.png")
            self.end_headers()
            if status == 200:
                self.wfile.write(DATA)

    with web_server(Handler) as port:
        yield f"http://127.0.0.1:{port}"


def test_every_way_gives_the_same_pixels(server: str, tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(DATA)
    code = base64.b64encode(DATA).decode()
    lines = "\n".join(code[i : i + 76] for i in range(0, len(code), 76))
    floats = torch.from_numpy(PIXELS.astype(np.float32) / 255)
    ways = [
        PAGE, DATA, path, str(path), f"{server}/page.png", f"{server}/moved",
        code, lines, f"data:image/png;base64,{code}",
        PIXELS, PIXELS.transpose(2, 0, 1), PIXELS.astype(np.int64), floats, floats.permute(2, 0, 1).double(),
        np.dstack([PIXELS, np.full((7, 12), 255, np.uint8)]),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        loaded = read_image(way)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), PIXELS), number
    nested = read_images([ways[0], (ways[9], [ways[1]])])
    assert [type(each) for each in nested] == [Image.Image, list]
    assert len(read_images(np.stack([PIXELS, PIXELS]))) == 2


def test_it_decodes_as_training_does(tmp_path: Path) -> None:
    """Transparency on white and the orientation, which transformers' own `load_image` treats otherwise."""
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(str(tmp_path / "a.png")).size == (4, 6)
    assert read_image(tmp_path / "a.png").tobytes() == decode_image(tmp_path / "a.png").tobytes() == b"\xff" * 72
    grey = np.arange(20, dtype=np.uint8).reshape(5, 4)
    assert np.array_equal(np.asarray(read_image(grey[:, :, None])), np.dstack([grey] * 3))
    assert np.asarray(read_image(torch.full((5, 5), 0.5, dtype=torch.bfloat16)))[0, 0, 0] == 128


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing.png", "image 'missing.png': neither a file, nor a URL .* nor an image in base64"),
        ("page", "image 'page': neither a file"),
        ("/", "image '/': not a regular file"),
        (b"text", "not an image of the formats PNG"),
        ("data:image/png;base64,####", "not base64"),
        ("SERVER/none.png", r"none.png': cannot be fetched \(HTTP Error 404"),
        ("http://127.0.0.1:9/a.png", r"cannot be fetched \(.*refused"),
        (np.zeros((5, 5, 2)), r"image of shape \(5, 5, 2\): no image: give \[H, W\]"),
        (np.zeros((0, 4)), "no image"),
        (np.full((4, 4), 255.0), r"values from 255.0 to 255.0; give integers from 0 to 255 or floats from 0 to 1"),
        (np.full((4, 4), np.nan), "values from nan to nan"),
        (np.full((4, 4), 300), "values from 300 to 300"),
        (np.full((4, 4), "a"), "of <U1; give integers"),
        (7, "an image is given as int, not as PIL image, array, tensor, bytes or string"),
    ],
    ids=range(14),
)
def test_what_is_no_image_is_said_in_one_line(server: str, source: Any, reason: str) -> None:
    if isinstance(source, str):
        source = source.replace("SERVER", server)
    with pytest.raises(ValueError, match=reason) as caught:
        read_image(source)
    assert "\n" not in str(caught.value)

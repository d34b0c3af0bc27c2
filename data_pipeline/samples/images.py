"""Image members: which files are a sample's images, their size from the header, and safe decoding to upright RGB.

Only plain raster formats are opened: never formats whose decoder starts another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.samples.schema import MAX_IMAGE_PIXELS, SampleError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
EXTENSIONS = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
    "PPM": "ppm",
    "MPO": "jpg",
}
_IMAGE = re.compile(r"(?:(\d{1,6})\.)?(?:jpg|jpeg|png|webp|tif|tiff|bmp|gif|ppm|pgm|pbm)\Z")
_ORIENTATION = 0x0112
_ORIENTED = ("JPEG", "MPO", "WEBP")
_SIDEWAYS = (5, 6, 7, 8)


def image_members(extensions: Iterable[str]) -> list[str]:
    """The extensions that are a sample's images, in order: a bare `png` first, then `0.png`, `1.jpg`, … by number."""
    numbered = []
    for extension in extensions:
        match = _IMAGE.match(extension)
        if match:
            numbered.append((int(match[1]) if match[1] else -1, extension))
    return [extension for _, extension in sorted(numbered)]


def image_size(stream: BinaryIO) -> tuple[int, int]:
    """(width, height) from the header, after the orientation its EXIF data asks for. Raises what PIL raises."""
    with _open(stream) as image:
        width, height = image.size
        sideways = _orientation(image) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def image_extension(data: bytes) -> str:
    """The file extension that fits these bytes. Raises SampleError when they are no image of a known format."""
    try:
        with _open(BytesIO(data)) as image:
            return EXTENSIONS[str(image.format)]
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError) as error:
        raise SampleError(f"not an image that can be read: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """Bytes of an image member as upright RGB; transparent parts become white. Raises SampleError."""
    try:
        image = _open(BytesIO(data))
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise SampleError(f"image of {width} x {height} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded")
        image.load()
        return _upright_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise SampleError(f"image cannot be decoded: {error}") from error


def _open(stream: BinaryIO) -> Image.Image:
    return Image.open(stream, formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 is upright. Cameras' formats only: PNG would decode all its pixels first, PIL turns TIFF."""
    return int(image.getexif().get(_ORIENTATION, 1)) if image.format in _ORIENTED else 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which PIL would clip instead of scaling
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")

"""From bytes to pixels: which files are a sample's images, their size from the header, and decoding to upright RGB.

Training, evaluation, chat, previews and importers all call `decode_image`; nothing else opens an image. Only plain
raster formats are read, none whose decoder starts another program. Colour profiles are left alone: the model sees the
numbers that the file holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from struct import unpack_from

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline.samples.jpeg_header import plain_jpeg_size
from data_pipeline.samples.schema import SampleError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""The formats that are read."""
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
"""PIL's name of a format that was read -> file extension; MPO is what PIL calls a JPEG with several pictures."""
MAX_IMAGE_BYTES = 256 * 1024**2
"""Largest image file or member that is read."""
MAX_IMAGE_PIXELS = 100_000_000
"""Largest image that is decoded, width x height: a guard against decompression bombs."""

ImageSource = bytes | str | os.PathLike | Image.Image
"""An image as bytes, as a file, or as PIL opened it."""

_IMAGE = re.compile(r"(?:(\d{1,6})(?:_.*)?\.)?(?:jpg|jpeg|png|webp|tif|tiff|bmp|gif|ppm|pgm|pbm)\Z")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


def image_members(extensions: Iterable[str]) -> list[str]:
    """A sample's images among its extensions, in order: a bare `png` first, then `0.png`, `1_name.jpg`, … by number."""
    numbered = [(number, each) for each in extensions if (number := _image_number(each)) is not None]
    numbered.sort()
    return [extension for _, extension in numbered]


def is_image(extension: str) -> bool:
    """Whether members with an extension are images."""
    return _image_number(extension) is not None


@lru_cache(maxsize=4096)  # an index asks three times for every sample
def _image_number(extension: str) -> int | None:
    """Number of the image that members with an extension are: -1 for a bare `png`; None where they are no image."""
    match = _IMAGE.match(extension)
    return None if match is None else int(match[1] or -1)


def decode_image(source: ImageSource) -> Image.Image:
    """The upright RGB pixels of an image. Raises SampleError.

    It is the first frame, turned as its metadata says; transparent parts become white, 16 bits are scaled to 8 and
    floats from 0 to 1 to 0 to 255. A PIL image that needs nothing of this is returned itself; none is changed.
    """
    with _sample_errors():
        if isinstance(source, Image.Image):
            image = source
        else:
            image = _open(source if isinstance(source, bytes) else image_bytes(source))
        if image.format is not None and image.format not in EXTENSIONS:
            raise SampleError(f"{image.format} images are not read, only {', '.join(FORMATS)}")
        check_size(*image.size)
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
        if rgb is not source:
            rgb.info.clear()  # else it would be turned again, and previews would carry its colour profile
        return rgb


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as `decode_image` will give them, from the header. Raises SampleError."""
    with _sample_errors():
        image = _open(data)
        if image.format == "PNG" and _metadata_behind_pixels(data):
            check_size(*image.size)
            image.load()
        width, height = image.size
        if image.format == "TIFF" and _ORIENTATION in image.tag_v2:  # type: ignore[attr-defined]
            return width, height  # PIL has turned it already
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def image_extension(data: bytes) -> str:
    """The file extension that fits these bytes. Raises SampleError when they are no image of a known format."""
    if plain_jpeg_size(data) is not None:  # opening it costs as much as everything else that writing does with it
        return "jpg"
    with _sample_errors():
        return EXTENSIONS[str(_open(data).format)]


def image_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file. Raises SampleError when it is missing, no regular file or too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise SampleError("not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise SampleError(f"image of {status.st_size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise SampleError(getattr(error, "strerror", None) or str(error)) from error


def check_size(width: int, height: int) -> None:
    """Raises SampleError for an image without pixels, and for one with more than are decoded."""
    if width < 1 or height < 1:
        raise SampleError(f"image of {width} x {height} pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise SampleError(f"image of {width} x {height} pixels; at most {MAX_IMAGE_PIXELS:,} are decoded")


@contextmanager
def _sample_errors() -> Iterator[None]:
    """Whatever a decoder says of damaged bytes, as a SampleError of one line."""
    try:
        yield
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"image cannot be decoded: not an image of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:  # PIL's own limit, above this one
        raise SampleError(f"image of more than {MAX_IMAGE_PIXELS:,} pixels, the most that are decoded") from error
    except Exception as error:  # PIL's decoders raise almost anything, KeyError and struct.error among it
        said = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(f"image cannot be decoded: {said}") from error


def _open(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data), formats=FORMATS)
    if not isinstance(image.info.get("xmp", b""), bytes):
        del image.info["xmp"]  # a TIFF's, stored as text or numbers: PIL would look for an orientation in it and fail
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation as far as the image has been read; 1 is upright. Metadata that is damaged says 1."""
    try:
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))  # PNG's own getexif would decode all its pixels
    except Exception:  # as in _sample_errors
        return 1


def _metadata_behind_pixels(png: bytes) -> bool:
    """Whether chunks that may hold an orientation follow the pixels, where PIL sees them only after decoding."""
    position, pixels_seen = 8, False
    while position + 8 <= len(png):
        length, kind = unpack_from(">I4s", png, position)
        pixels_seen = pixels_seen or kind == b"IDAT"
        if pixels_seen and kind in _PNG_METADATA:
            return True
        position += 12 + length
    return False


def _rgb(image: Image.Image) -> Image.Image:
    """The image as it lies, as RGB; itself when it is RGB without transparency."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # PIL would clip these instead of scaling
        image = Image.fromarray(_eight_bits(image))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey levels of 12, 16 or 32 bits as uint8 [H, W]. Raises SampleError where black and white are not known."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
    white = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # also with NaN
        raise SampleError(f"grey levels from {low} to {high}, but black is 0 and white is {white}")
    grey = (values * 255 + 0.5 if image.mode == "F" else values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which PIL minds for 8 bits only
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return grey

"""The images that a request carries or, where whoever started the server allows it, names."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.fetching import not_allowed, too_many_bytes
from alignvlm.serving.web.limits import Limits
from data_pipeline.samples.images import decode_image, image_bytes, image_size
from data_pipeline.samples.schema import SampleError


def is_web(url: str) -> bool:
    """Whether the image is on a web server (web/fetching.py)."""
    return url.lower().startswith(("http:", "https:"))


def read_all(urls: Mapping[str, str], fetched: Mapping[str, bytes], limits: Limits) -> dict[str, bytes]:
    """The files of images, from data URLs, a folder that `limits` names, or `fetched`.

    Args:
        urls: by their places in the request.

    Raises:
        RequestError: one may not or cannot be read, or they are too large together.
    """
    files: dict[str, bytes] = {}
    left = limits.max_body
    for param, url in urls.items():
        files[param] = fetched[param] if param in fetched else _read(url, param, limits, left)
        left -= len(files[param])
        if left < 0:
            raise too_many_bytes(limits, param)
    return files


def decode_all(files: Mapping[str, bytes], limits: Limits) -> list[Image.Image]:
    """Images of files by their places in the request. Raises RequestError for too large or damaged ones."""
    images: list[Image.Image] = []
    pixels = 0
    for param, data in files.items():
        try:
            width, height = image_size(data)
            pixels += width * height
            if pixels > limits.max_pixels:
                raise RequestError(
                    f"images of {pixels:,} pixels up to here; at most {limits.max_pixels:,} are decoded for a request",
                    param=param,
                    code="image_too_large",
                )
            images.append(decode_image(data))
        except SampleError as error:
            raise RequestError(str(error), param=param, code="invalid_image") from error
    return images


def _read(url: str, param: str, limits: Limits, most: int) -> bytes:
    head, comma, data = url.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError("the data URL is not base64", param=param, code="invalid_image") from error
    try:
        parts = urlsplit(url)
        if parts.scheme == "file" and not parts.netloc and limits.image_folder is not None:
            path = Path(unquote(parts.path)).resolve()
            if path.is_relative_to(limits.image_folder.resolve()):
                if path.stat().st_size > most:
                    raise too_many_bytes(limits, param)
                return image_bytes(path)
    except (OSError, ValueError, RuntimeError, SampleError) as error:  # of a strange URL, a circle of links, a file
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RequestError(f"the image cannot be read: {reason}", param=param, code="invalid_image") from error
    raise not_allowed(param)

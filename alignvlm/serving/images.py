"""The images that a request carries or, where whoever started the server allows it, names."""

from __future__ import annotations

import base64
import binascii
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from alignvlm.serving.errors import RequestError
from data_pipeline.samples.images import decode_image, image_bytes, image_size
from data_pipeline.samples.schema import SampleError

if TYPE_CHECKING:
    from alignvlm.serving.requests import Limits

FETCH_SECONDS = 10
"""How long a web server may stay silent."""


def read_source(url: str, param: str, limits: Limits) -> bytes:
    """The file of an image, from a data URL; from a web server or a folder only if `limits` names it.

    Raises:
        RequestError: it may not or cannot be read; `param` is the place of the URL in the request.
    """
    head, comma, data = url.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError("the data URL is not base64", param=param, code="invalid_image") from error
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname in limits.image_hosts and "@" not in parts.netloc:
            return _fetched(url, limits.max_body)
        if parts.scheme == "file" and not parts.netloc and limits.image_folder is not None:
            path = Path(unquote(parts.path)).resolve()
            if path.is_relative_to(limits.image_folder.resolve()):
                return image_bytes(path)
    except (OSError, HTTPException, ValueError, SampleError) as error:  # of a strange URL, a server, a file
        reason = " ".join(str(error).split())
        raise RequestError(f"the image cannot be read: {reason}", param=param, code="invalid_image") from error
    raise RequestError(
        "this server fetches no such URL and opens no such file: send the image itself as "
        "data:image/png;base64,… (or image/jpeg, …)",
        param=param,
        code="image_url_not_allowed",
    )


def decode_all(sources: list[tuple[str, bytes]], limits: Limits) -> list[Image.Image]:
    """Images of (place in the request, file). Raises RequestError for too large or damaged ones."""
    images: list[Image.Image] = []
    pixels = 0
    for param, data in sources:
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


def _fetched(url: str, most: int) -> bytes:
    with _open(url, timeout=FETCH_SECONDS) as answer:
        data = answer.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes, the most that are fetched")
    return data


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A server that is allowed sends nobody on to one that is not."""

    def redirect_request(self, *args: Any) -> None:
        """None: the redirection becomes an error."""


_open = urllib.request.build_opener(_NoRedirects).open

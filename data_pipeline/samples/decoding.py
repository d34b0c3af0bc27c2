"""Members' bytes to values, through webdataset's decoder with only the handlers that are safe: JSON, text, images.

webdataset's default handlers would also unpickle; none of them is used here.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from data_pipeline.samples.images import decode_image, image_members
from data_pipeline.samples.schema import SampleError


def decode_member(extension: str, data: bytes) -> Any:
    """A JSON value, a str, or an upright RGB image. Raises SampleError when the bytes are not what the extension
    says.
    """
    try:
        return _decoder().decode1(extension, data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"member .{extension} cannot be decoded: {error}") from error


@cache
def _decoder() -> Any:
    from webdataset.autodecode import Decoder, handle_extension

    handlers = [handle_extension("json", json.loads), handle_extension("txt", _text), _image_handler]
    return Decoder(handlers, pre=[], post=[_refuse])


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _image_handler(key: str, data: bytes) -> Any:
    return decode_image(data) if image_members([key.removeprefix(".").lower()]) else None


def _refuse(key: str, data: bytes) -> Any:
    raise SampleError(f"members {key} are not decoded: only JSON, text and images are")

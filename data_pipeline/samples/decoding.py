"""Members' bytes to values, by extension: JSON, text and images only. Nothing is ever unpickled."""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.samples.images import decode_image, is_image
from data_pipeline.samples.schema import SampleError


def decode_member(extension: str, data: bytes) -> Any:
    """A JSON value, a str, or an upright RGB image. Raises SampleError when the bytes are not what the extension says.

    `extension` is in lower case and without its dot, as the index has it.
    """
    if is_image(extension):
        return decode_image(data)
    try:
        if extension == "json":
            return json.loads(data)
        if extension == "txt":
            return data.decode()
    except (ValueError, RecursionError) as error:
        raise SampleError(f"member .{extension} cannot be decoded: {error}") from error
    raise SampleError(f"members .{extension} are not decoded: only JSON, text and images are")

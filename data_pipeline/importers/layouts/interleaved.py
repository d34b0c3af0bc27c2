"""Documents of texts and images in turn: OBELICS (`texts` and `images`, one set at each place) and MMC4.

Images, with the text before the first of them, are the user's turns; the text that follows is the assistant's, so the
loss covers what comes after an image.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.importers.layouts.layout import Layout, Messages, Row, column
from data_pipeline.samples.schema import SampleError

_PLACES = "__places__"
"""What stands at each place: a text, or None for an image."""


def fits(row: Row) -> bool:
    if {"text_list", "image_info"} <= row.keys():
        return True
    texts, images = row.get("texts"), row.get("images")
    return (
        isinstance(texts, list)
        and isinstance(images, list)
        and len(texts) == len(images)
        and all(text is None or isinstance(text, str) for text in texts)
    )


def images(row: Row) -> list[Any]:
    if "text_list" in row:
        return _images_of_mmc4(row)
    texts, found = column(row, "texts"), column(row, "images")
    if not isinstance(texts, list) or not isinstance(found, list) or len(texts) != len(found):
        raise SampleError("'texts' and 'images' are not two lists of the same length")
    if any((text is None) == (image is None) for text, image in zip(texts, found, strict=True)):
        raise SampleError("not exactly one of a text and an image at each place")
    row[_PLACES] = texts
    return [image for image in found if image is not None]


def _images_of_mmc4(row: Row) -> list[Any]:
    texts, infos = column(row, "text_list"), column(row, "image_info")
    if not isinstance(texts, list) or not isinstance(infos, list):
        raise SampleError("'text_list' and 'image_info' are not two lists")
    placed: dict[int, list[Any]] = {}
    for info in infos:
        number = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(number, int) or not 0 <= number < len(texts) or not info.get("image_name"):
            raise SampleError(f"an image belongs to no text: {str(info)[:80]!r}")
        placed.setdefault(number, []).append(info["image_name"])
    row[_PLACES] = [each for n, text in enumerate(texts) for each in [*[None] * len(placed.get(n, ())), text]]
    return [name for number in sorted(placed) for name in placed[number]]


def messages(row: Row) -> Messages:
    turns: Messages = []
    for text in row.pop(_PLACES):
        role = "user" if text is None or not _has_image(turns) else "assistant"
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        turns[-1]["content"].append({"type": "image"} if text is None else {"type": "text", "text": text})
    if not _has_image(turns):
        raise SampleError("the document has no image")
    return turns


def _has_image(turns: Messages) -> bool:
    return any(part["type"] == "image" for turn in turns for part in turn["content"])


LAYOUT = Layout(fits, messages, images)

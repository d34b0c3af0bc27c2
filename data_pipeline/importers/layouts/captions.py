"""An image and its caption per row; img2dataset's parquet files among them, with the rows that it could not fetch."""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import IMAGE_COLUMNS, Layout, Messages, Row, column, take_images
from data_pipeline.samples.schema import SampleError
from data_pipeline.samples.turns import turn_messages

_CAPTIONS = ("caption", "txt", "text")


def fits(row: Row) -> bool:
    return any(name in row for name in _CAPTIONS) and ("status" in row or any(name in row for name in IMAGE_COLUMNS))


def images(row: Row) -> list[object]:
    if row.get("status", "success") != "success":
        raise SampleError(f"img2dataset did not fetch it: {row['status']}: {row.get('error_message')}")
    found = take_images(row)
    if len(found) != 1:
        raise SampleError(f"a caption has one image, this one has {len(found)}")
    return found


def messages(row: Row) -> Messages:
    prompt = row.pop("prompt", None) or ""
    return turn_messages([prompt, column(row, *_CAPTIONS)])


LAYOUT = Layout(fits, messages, images)

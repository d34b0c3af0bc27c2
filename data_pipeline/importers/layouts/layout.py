"""What a layout is: how a row of a published dataset becomes a conversation with its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipeline.samples.schema import SampleError

Row = dict[str, Any]
Messages = list[dict[str, Any]]
IMAGE_COLUMNS = ("images", "image", "jpg", "jpeg", "png", "webp")
"""Columns with a row's images; the first that is there is taken."""


def take_images(row: Row) -> list[Any]:
    """The images of a row, which are taken out of it; none where no column has them."""
    column = next((name for name in IMAGE_COLUMNS if row.get(name) is not None), None)
    value = None if column is None else row.pop(column)
    for name in IMAGE_COLUMNS:
        row.pop(name, None)
    if value is None:
        return []
    return [each for each in value if each is not None] if isinstance(value, list) else [value]


def column(row: Row, *names: str) -> Any:
    """The first of these columns that the row has, taken out of it. Raises SampleError when it is null or missing."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise SampleError(f"no {' and no '.join(map(repr, names))}")
    return row.pop(name)


@dataclass(frozen=True)
class Layout:
    """How a published dataset's rows are read.

    `fits` says whether a row's columns are this layout's. `images` takes the images out of a row. `messages` takes out
    the conversation, images not placed yet or placed as parts; what they leave in the row is meta data. Both raise
    SampleError for a row that cannot be used.
    """

    fits: Callable[[Row], bool]
    messages: Callable[[Row], Messages]
    images: Callable[[Row], list[Any]] = take_images

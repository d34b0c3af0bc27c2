"""PixMo: docs (`questions`), cap (`transcripts`), points, and the sets of questions whose images are URLs.

An image that is a URL is looked for among `--images` under the sha256 of the URL, as Molmo's downloader names it.
Points are written as Molmo does, in percent of width and height. Rows of point-explanations are rejected.
"""

from __future__ import annotations

import hashlib
from typing import Any

from data_pipeline.importers.layouts.layout import IMAGE_COLUMNS, Layout, Messages, Row, column, take_images
from data_pipeline.samples.schema import SampleError
from data_pipeline.samples.turns import pair_messages, turn_messages


def fits(row: Row) -> bool:
    if "image_url" in row and not any(name in row for name in IMAGE_COLUMNS):  # with an image: InfographicVQA
        return True
    return {"label", "points"} <= row.keys() or isinstance(row.get("questions"), dict | list)


def images(row: Row) -> list[Any]:
    found, url = take_images(row), row.get("image_url")
    if not found and isinstance(url, str):
        return [hashlib.sha256(url.encode(errors="replace")).hexdigest()]
    return found


def messages(row: Row) -> Messages:
    if row.get("questions") is not None:
        asked = row.pop("questions")
        if isinstance(asked, dict):
            return pair_messages(asked.get("question"), asked.get("answer"))
        if not isinstance(asked, list) or not all(
            isinstance(e, dict) and {"question", "answer"} <= e.keys() for e in asked
        ):
            raise SampleError("'questions' are not questions with an answer each")
        return pair_messages([each["question"] for each in asked], [each["answer"] for each in asked])
    if row.get("points") is not None and "label" in row:
        return turn_messages([f"Point to: {row['label']}", _points(column(row, "points"), str(column(row, "label")))])
    if row.get("messages") is not None:
        return turn_messages(row.pop("messages"))
    if row.get("caption") is not None:
        return turn_messages(["", row.pop("caption")])
    return pair_messages(column(row, "question"), column(row, "answer"))


def _points(points: Any, label: str) -> str:
    """<point x y alt>label</point>, or <points x1 y1 x2 y2 … alt>. Raises SampleError when a point has no place."""
    try:
        places = [(f"{point['x']:.1f}", f"{point['y']:.1f}") for point in points]
    except (KeyError, TypeError, ValueError) as error:
        raise SampleError("'points' are not places of x and y") from error
    if not places:
        return "There are none."
    text = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    if len(places) == 1:
        return f'<point x="{places[0][0]}" y="{places[0][1]}" alt="{text}">{text}</point>'
    where = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(places, 1))
    return f'<points {where} alt="{text}">{text}</points>'


LAYOUT = Layout(fits, messages, images)

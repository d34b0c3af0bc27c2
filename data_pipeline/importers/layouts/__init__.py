"""Published layouts by name: a registry, whose order is that in which `auto` tries them on the first row."""

from __future__ import annotations

from reprlib import repr as brief

from data_pipeline.errors import DataError
from data_pipeline.importers.layouts import (
    bigdocs,
    captions,
    finevision,
    interleaved,
    llava,
    messages,
    pixmo,
    questions,
)
from data_pipeline.importers.layouts.layout import Layout, Row

LAYOUTS: dict[str, Layout] = {
    "llava": llava.LAYOUT,
    "pixmo": pixmo.LAYOUT,
    "messages": messages.LAYOUT,
    "finevision": finevision.LAYOUT,
    "interleaved": interleaved.LAYOUT,
    "bigdocs": bigdocs.LAYOUT,
    "questions": questions.LAYOUT,
    "captions": captions.LAYOUT,
}


def register_layout(name: str, layout: Layout) -> None:
    """Add a layout, or replace one."""
    LAYOUTS[name] = layout


def find_layout(row: Row, name: str = "auto") -> str:
    """The name itself, or for `auto` that of the first layout that fits a row's columns. Raises DataError."""
    if name != "auto":
        return name
    found = next((each for each, layout in LAYOUTS.items() if layout.fits(row)), None)
    if found is None:
        columns = ", ".join(brief(name).strip("'") for name in row) or "(none)"
        raise DataError(
            f"no known layout has the columns {columns[:500]}; name the format with --format "
            f"({', '.join(LAYOUTS)}), or say what the columns are, such as --columns messages=chat,images=pages"
        )
    return found

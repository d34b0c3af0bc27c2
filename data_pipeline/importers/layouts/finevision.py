"""`images` and `texts`, pairs of {"user", "assistant"}: FineVision, The Cauldron and Docmatix."""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import Layout, Row, column
from data_pipeline.samples.turns import turn_messages


def fits(row: Row) -> bool:
    texts = row.get("texts")
    return isinstance(texts, list) and any(isinstance(each, dict) and "assistant" in each for each in texts)


LAYOUT = Layout(fits, messages=lambda row: turn_messages(column(row, "texts")))

"""LLaVA's layout, also of LLaVA-NeXT and LLaVA-OneVision-Data: `conversations` of {"from", "value"}, `image`."""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import Layout, column
from data_pipeline.samples.turns import turn_messages

LAYOUT = Layout(
    fits=lambda row: "conversations" in row, messages=lambda row: turn_messages(column(row, "conversations"))
)

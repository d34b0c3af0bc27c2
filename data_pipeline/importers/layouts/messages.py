"""`messages` of {"role", "content"}, as chat datasets have them, and DocDownstream, DocStruct4M and DocReason25K."""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import Layout, column
from data_pipeline.samples.turns import turn_messages

LAYOUT = Layout(fits=lambda row: "messages" in row, messages=lambda row: turn_messages(column(row, "messages")))

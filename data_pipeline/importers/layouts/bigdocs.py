"""BigDocs: `images`, `queries` and `annotations`, as many of one as of the other.

Some of its subsets are published without their pixels; these rows are rejected until `--images` names a folder of them.
"""

from __future__ import annotations

from data_pipeline.importers.layouts.layout import Layout, Messages, Row, column
from data_pipeline.samples.turns import pair_messages


def messages(row: Row) -> Messages:
    return pair_messages(column(row, "queries"), column(row, "annotations"))


LAYOUT = Layout(lambda row: {"queries", "annotations"} <= row.keys(), messages)

"""`alignvlm data …`: make shards, check them, and see the order of the data before training."""

from __future__ import annotations

from typing import Any

from alignvlm.cli.data import order, shards, write


def add_parser(subparsers: Any) -> None:
    """Add `data` and its actions to the command line."""
    parser = subparsers.add_parser(
        "data", help="write, fetch, index and verify shards; print, compare and draw the training order"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for module in (write, shards, order):
        module.add_parser(actions)

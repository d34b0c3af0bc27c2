"""`alignvlm chat` and `alignvlm serve`."""

from __future__ import annotations

from typing import Any

from alignvlm.cli.serving import chat, serve


def add_parser(subparsers: Any) -> None:
    """Add both commands to the command line."""
    chat.add_parser(subparsers)
    serve.add_parser(subparsers)

"""`alignvlm chat`, `alignvlm serve` and `alignvlm demo`."""

from __future__ import annotations

from typing import Any

from alignvlm.cli.serving import chat, demo, serve


def add_parser(subparsers: Any) -> None:
    """Add these commands to the command line."""
    for command in (chat, serve, demo):
        command.add_parser(subparsers)

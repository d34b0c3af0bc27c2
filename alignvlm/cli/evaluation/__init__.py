"""`alignvlm eval` and `alignvlm score`."""

from __future__ import annotations

from typing import Any

from alignvlm.cli.evaluation import evaluate, score


def add_parser(subparsers: Any) -> None:
    """Add both commands to the command line."""
    evaluate.add_parser(subparsers)
    score.add_parser(subparsers)

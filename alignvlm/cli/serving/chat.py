"""`alignvlm chat`: talk with an exported model about images, or ask one question."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

from alignvlm.cli.arguments import path, positive, word
from alignvlm.cli.output import one_line
from alignvlm.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add `chat` to the command line."""
    parser = subparsers.add_parser("chat", help="ask an exported model about images")
    parser.add_argument("export", type=path, metavar="EXPORT", help="export folder of a model")
    parser.add_argument(
        "--image", type=path, metavar="FILE", action="append", default=[], help="image file; may be repeated"
    )
    parser.add_argument("--question", type=word, metavar="TEXT", help="answer this question and exit")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--device", type=word, metavar="DEVICE", help="cpu, cuda, … (default: CUDA where there is a GPU)"
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one answer, or hold a conversation, which a question that cannot be asked does not end."""
    from alignvlm.cli.imports import import_model
    from alignvlm.exports import check_export
    from alignvlm.serving.chat import ChatSession

    check_export(arguments.export)  # a mistake need not wait for the imports
    import_model()
    session = ChatSession(arguments.export, arguments.image, arguments.device, arguments.max_new_tokens)
    if arguments.question is not None:
        print(session.ask(arguments.question))
        return 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text spoil one question
    print("Press Ctrl-D or enter an empty line to quit.")
    while True:
        try:
            question = input("you: ").strip()
        except EOFError:
            return 0
        if not question:
            return 0
        try:
            print(f"model: {session.ask(question)}")
        except UserError as error:
            print(f"alignvlm: {one_line(str(error))}", file=sys.stderr)

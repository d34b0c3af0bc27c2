"""`alignvlm chat`: ask an exported model about images, in the terminal or once with --question."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="ask an exported model about images")
    parser.add_argument("export", type=Path, help="folder of an exported model")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image; may be given several times")
    parser.add_argument("--question", help="answer this and end")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", help="cpu, cuda, …; default: CUDA when there is one")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.serving.chat import ChatSession

    session = ChatSession(arguments.export, arguments.image, arguments.device, arguments.max_new_tokens)
    if arguments.question is not None:
        print(session.ask(arguments.question))
        return 0
    print("an empty line or Ctrl-D ends the conversation")
    while True:
        try:
            question = input("you: ").strip()
        except EOFError:
            return 0
        if not question:
            return 0
        print(f"model: {session.ask(question)}")

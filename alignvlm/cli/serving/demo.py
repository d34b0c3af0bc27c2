"""`alignvlm demo`: a page for the browser that asks an exported model about images."""

from __future__ import annotations

import argparse
import os
from typing import Any

from alignvlm.cli.arguments import path, web_address
from alignvlm.cli.serving.serve import KEY_VARIABLE, add_address, api_key, serving_errors
from alignvlm.errors import UserError
from data_pipeline.masking import mask

SERVER_KEY_VARIABLE = "OPENAI_API_KEY"


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="ask an exported model about images in a browser",
        description="Serve a page that asks about images and shows which text tokens the connector turned their "
        "patches into, with the export's API beside it. Examples come from the gallery of the export's evaluation. "
        f"Where {KEY_VARIABLE} is set, the page asks for it.",
    )
    parser.add_argument(
        "export",
        type=path,
        nargs="?",
        metavar="EXPORT",
        help="export folder of a model; with --server it only gives the tokens",
    )
    parser.add_argument(
        "--server",
        type=web_address,
        metavar="URL",
        help="a server with OpenAI's API that answers instead, such as vLLM; "
        f"{SERVER_KEY_VARIABLE} holds its key if any",
    )
    add_address(parser)
    parser.set_defaults(handler=run, port=8080)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from alignvlm.cli.imports import import_model
    from alignvlm.exports import check_export, name_of_export

    if arguments.export is None and arguments.server is None:
        raise UserError("give an export folder, such as runs/quickstart/3-instruct/export, or --server URL, or both")
    if arguments.export is not None:
        check_export(arguments.export)
    key = api_key()
    with serving_errors():
        from alignvlm.serving.app import LOOPBACK, create_app
        from alignvlm.serving.demo.app import PRIVATE, demo_routes
        from alignvlm.serving.demo.relay import relay_routes
        from alignvlm.serving.web.server import address_of, is_loopback, listen, serve
    from alignvlm.serving.demo.examples import find_examples
    from alignvlm.serving.engine import Engine

    with listen(arguments.host, arguments.port) as bound:
        if arguments.export is not None:
            import_model()
        engine = Engine.load(arguments.export, arguments.device) if arguments.export else None
        title = name_of_export(arguments.export) if arguments.export else mask(arguments.server).partition("://")[2]
        routes = demo_routes(title, find_examples(arguments.export) if arguments.export else [], engine)
        if arguments.server:
            routes += relay_routes(arguments.server, os.environ.get(SERVER_KEY_VARIABLE))
        hosts = LOOPBACK if is_loopback(bound) else None
        own = None if arguments.server else engine
        app = create_app(own, routes=routes, hosts=hosts, api_key=key, private=PRIVATE)
        print(f"{title}: open {address_of(bound)} in a browser (Ctrl-C ends it)", flush=True)
        if key is not None:
            print(f"the page asks for the key that {KEY_VARIABLE} holds", flush=True)
        serve(app, bound, engine.stop if engine else lambda: None)
    return 0

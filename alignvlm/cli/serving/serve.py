"""`alignvlm serve`: an OpenAI-compatible server for an export."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alignvlm.cli.arguments import endpoint, folder, path, port, positive, word
from alignvlm.errors import UserError

KEY_VARIABLE = "ALIGNVLM_API_KEY"


def add_parser(subparsers: Any) -> None:
    """Add `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="answer requests to OpenAI's API with an exported model",
        description="Serve POST /v1/chat/completions, GET /v1/models and GET /health until Ctrl-C. Images come inside "
        f"requests, as data URLs. Where {KEY_VARIABLE} is set, clients must send it as their key.",
    )
    parser.add_argument("export", type=path, metavar="EXPORT", help="export folder of a model")
    add_address(parser)
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer together (default: all positions of the language model)",
    )
    parser.add_argument(
        "--max-requests",
        type=positive,
        default=16,
        metavar="N",
        help="requests that are answered or wait at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--image-host",
        type=endpoint,
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="fetch images from this web server when requests name them by URL; without PORT, from its ports 80 "
        "and 443; may be repeated (default: fetch none)",
    )
    parser.add_argument(
        "--image-folder",
        type=folder,
        metavar="FOLDER",
        help="read images in this folder when requests name them by file: URL (default: read none)",
    )
    parser.set_defaults(handler=run)


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add where to listen and to compute."""
    parser.add_argument(
        "--host",
        type=word,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s, only this machine)",
    )
    parser.add_argument(
        "--port",
        type=port,
        default=8000,
        metavar="N",
        help="port to listen on; 0 takes any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=word, metavar="DEVICE", help="cpu, cuda, … (default: CUDA where there is a GPU)"
    )


@contextmanager
def serving_errors() -> Iterator[None]:
    """Names the extra of packages that serving needs and that are not here."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("httpx2", "starlette", "uvicorn"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'alignvlm[serve]'") from error


def api_key() -> str | None:
    """What clients must send; None lets all in. Raises UserError for a key that no HTTP header holds."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"{KEY_VARIABLE}: give letters, digits and signs of ASCII, without spaces or line ends")
    return key or None


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from alignvlm.cli.imports import import_model
    from alignvlm.exports import check_export

    check_export(arguments.export)
    key = api_key()
    with serving_errors():
        from alignvlm.serving.app import LOOPBACK, create_app
        from alignvlm.serving.web.server import address_of, is_loopback, listen, serve
    from alignvlm.serving.engine import Engine
    from alignvlm.serving.web.limits import Limits

    bound = listen(arguments.host, arguments.port)
    with bound:
        import_model()
        engine = Engine.load(arguments.export, arguments.device, arguments.max_context)
        app = create_app(
            engine,
            Limits(
                max_requests=arguments.max_requests,
                image_hosts=tuple(arguments.image_host),
                image_folder=arguments.image_folder,
            ),
            hosts=LOOPBACK if is_loopback(bound) else None,
            api_key=key,
        )
        print(f"{engine.name} answers at {address_of(bound)}/v1 (Ctrl-C ends it)", flush=True)
        serve(app, bound, engine.stop)
    return 0

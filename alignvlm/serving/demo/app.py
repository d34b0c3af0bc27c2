"""The routes of the demo page: its files, what it has to know, examples, and what patches were turned into.

Questions go to `/v1/chat/completions` beside them, of this process or of another server (relay.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Send

from alignvlm.evaluation.vocabulary_view import has_view
from alignvlm.resources import resource
from alignvlm.serving.demo.examples import Example
from alignvlm.serving.demo.vocabulary import lay_vocabulary
from alignvlm.serving.engine import Engine
from alignvlm.serving.images import decode_all
from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.guarded import Guarded
from alignvlm.serving.web.limits import Limits
from data_pipeline.samples.images import image_bytes, image_extension
from data_pipeline.samples.schema import SampleError

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""What a browser lets the page do: nothing of another origin, nothing that is written inside the markup."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
BYTES = "application/octet-stream"
"""Content type of an image to be read: a foreign web page cannot send it without asking."""
PRIVATE = ("/v1", "/demo/config.json", "/demo/examples", "/demo/vocabulary")
"""What wants the key where there is one: all but the page itself, which asks for it."""


def demo_routes(
    title: str, examples: Sequence[Example] = (), engine: Engine | None = None, limits: Limits | None = None
) -> list[BaseRoute]:
    """Routes for `create_app`.

    Args:
        title: name of the model, as the page shows it.
        examples: questions that the page offers.
        engine: the model whose connector is looked into; without one, or with another connector than ALIGN, the page
            shows no text tokens.
        limits: of a request.
    """
    taken = limits or Limits()
    shows_tokens = engine is not None and has_view(engine.answerer.model, engine.answerer.processor)
    config = {
        "title": title,
        "vocabulary": shows_tokens,
        "examples": [_described(number, example) for number, example in enumerate(examples)],
        # Images travel in base64, four bytes for three, beside the text.
        "limits": {"bytes": (taken.max_body - taken.max_body // 16) * 3 // 4, "images": taken.max_images},
    }
    files = {path.name: path for path in [*resource("page").iterdir(), resource("templates", "report.css")]}

    async def page(request: Request) -> Response:
        return _file("index.html")

    async def part(request: Request) -> Response:
        return _file(request.path_params["name"])

    def _file(name: str) -> Response:
        path = files.get(name)
        if path is None:
            return RequestError("the page has no such file", 404).response()
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)

    async def configuration(request: Request) -> Response:
        return JSONResponse(config, headers=HEADERS)

    async def picture(request: Request) -> Response:
        number, image = request.path_params["number"], request.path_params["image"]
        try:
            data = image_bytes(examples[number].images[image])
            return Response(data, media_type=f"image/{image_extension(data)}", headers=HEADERS)
        except (IndexError, SampleError) as error:
            return RequestError(f"this example has no such image ({error})", 404).response()

    async def vocabulary(body: bytes, send: Send) -> Response:
        if engine is None:
            raise RequestError("no export is loaded here: start alignvlm demo with one", 404)
        (image,) = await engine.prepare(decode_all, {"image": body}, taken)
        return JSONResponse(await engine.run(_laid, engine, image), headers=HEADERS)

    return [
        Route("/", page),
        Route("/demo/config.json", configuration),
        Route("/demo/page/{name}", part),
        Route("/demo/examples/{number:int}/{image:int}", picture),
        Route("/demo/vocabulary", Guarded(vocabulary, BYTES, taken), methods=["POST"]),
    ]


def _described(number: int, example: Example) -> dict[str, Any]:
    images = [f"demo/examples/{number}/{image}" for image in range(len(example.images))]
    return {"task": example.task, "question": example.question, "answers": example.answers, "images": images}


def _laid(engine: Engine, image: Image.Image) -> dict[str, Any]:
    """The strongest tokens of every patch of an image; runs in the model's thread."""
    try:
        return lay_vocabulary(engine.answerer, image)
    except SampleError as error:
        raise RequestError(str(error), code="invalid_image") from error

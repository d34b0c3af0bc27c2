"""What the connector turned the patches of an image into, laid over the image, for the page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from PIL import Image

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.vocabulary_view import vocabulary_view
from alignvlm.report.overlay import SHOWN_WIDTH, place_cells, shown_height
from data_pipeline.samples.schema import SampleError


def lay_vocabulary(answerer: ModelAnswerer, image: Image.Image) -> dict[str, Any]:
    """The strongest tokens of every patch of an image.

    Returns:
        {"width", "height" of the drawing, "cells": those of `place_cells`, "entropy": mean in nats, "vocabulary": V}.

    Raises:
        SampleError: the connector has no such view.
    """
    view = vocabulary_view(answerer.model, answerer.processor, image)
    if view is None:
        raise SampleError("this model's connector does not turn patches into text tokens")
    return {
        "width": SHOWN_WIDTH,
        "height": shown_height(image.size),
        "cells": [asdict(cell) for cell in place_cells(view, image.size)],
        "entropy": view["entropy"],
        "vocabulary": view["vocabulary"],
    }

"""How much of the visual tokens depends on the image: their variance between images at the same place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.samples.images import decode_image

THRESHOLD = 0.01
"""A visual token tells images apart when the variance at its place is at least this part of the whole variance."""


@dataclass(frozen=True)
class ImageInformation:
    """Over some images of which at least two have as many tiles."""

    variance_share: float
    """Variance between images at the same place, as a part of the variance of all visual tokens."""
    token_share: float
    """Part of the visual tokens whose place has a variance between images of at least THRESHOLD of the whole."""
    num_images: int


class _Place:
    """Running mean [P, D] and summed squared deviation [P] of every place (Welford), over images of one layout."""

    def __init__(self, tokens: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(tokens)
        self.deviation = tokens.new_zeros(len(tokens))

    def add(self, tokens: Tensor) -> None:
        self.count += 1
        delta = tokens - self.mean
        self.mean += delta / self.count
        self.deviation += (delta * (tokens - self.mean)).sum(-1)


@torch.inference_mode()
def image_information(model: Any, processor: Any, images: Iterable[Image.Image]) -> ImageInformation | None:
    """What the visual tokens of these images tell about them; None where no two images have as many tiles.

    A place is a position in a tile, by the number of the tile and of all tiles of the image: images of one layout are
    compared with each other, and variances are weighted by their tokens.
    """
    layouts: dict[int, _Place] = {}
    for image in images:
        tiles = torch.from_numpy(processor.spec.cut(decode_image(image))).to(model.device)
        parts = [model.get_image_features(part).pooler_output for part in tiles.split(4)]
        tokens = torch.cat(parts).flatten(0, 1).double().cpu()  # [P, D]
        layouts.setdefault(len(tiles), _Place(tokens)).add(tokens)
    places = [place for place in layouts.values() if place.count > 1]
    if not places:
        return None
    num_tokens = sum(place.count * len(place.mean) for place in places)
    mean = sum(place.count * place.mean.sum(0) for place in places) / num_tokens
    between = sum(float(place.deviation.sum()) for place in places) / num_tokens
    among = sum(place.count * float((place.mean - mean).square().sum()) for place in places) / num_tokens
    whole = between + among
    telling = sum(
        place.count * int((place.deviation / place.count >= THRESHOLD * whole).sum()) for place in places if whole > 0
    )
    share = between / whole if whole > 0 else 0.0
    return ImageInformation(share, telling / num_tokens, sum(place.count for place in places))

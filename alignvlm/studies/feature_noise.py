"""Gaussian noise on the vision features of a model: how much of it a connector passes on (the paper, section 5)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from alignvlm.errors import UserError
from data_pipeline.samples.images import decode_image

_TILES = 4
"""Tiles that go through the model at once."""


@contextmanager
def feature_noise(model: Any, sigma: float, seed: int = 0) -> Iterator[None]:
    """While this is open, noise from N(0, sigma²) is added to the features [K, T, d] that enter the connector.

    The noise of a tile depends on the seed and the tile's pixels alone: it is the same in any batch, on any number of
    ranks, and for every sigma but for its size.
    """
    seeds: list[int] = []

    def see(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        pixels = named["pixel_values"].float().cpu().numpy()
        seeds[:] = [zlib.crc32(tile.tobytes(), seed) for tile in pixels]

    def disturb(module: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features, embedding = inputs
        noise = [torch.randn(features.shape[1:], generator=torch.Generator().manual_seed(each)) for each in seeds]
        return (features.float() + sigma * torch.stack(noise).to(features.device)).to(features.dtype), embedding

    hooks = [
        model.model.vision_tower.register_forward_pre_hook(see, with_kwargs=True),
        model.model.connector.register_forward_pre_hook(disturb),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class FeatureScale:
    """What clean features and outputs look like over some images."""

    features: float
    """Standard deviation of all entries of the vision features."""
    mean_output: Tensor
    """[D] float64: the mean visual token."""
    num_images: int
    num_visual_tokens: int


@torch.inference_mode()
def measure_scale(model: Any, processor: Any, images: Iterable[Image.Image]) -> FeatureScale:
    """The scale of the features and the mean output over these images. Raises UserError without any image."""
    total, squares, outputs = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    num_images = num_features = num_tokens = 0
    for image in images:
        for part in _tiles(model, processor, image):
            features = model.model.encode_tiles(part).double()
            tokens = model.model.connector(features.to(model.dtype), model.model.connector_embedding).double()
            total, squares = total + float(features.sum()), squares + float(features.square().sum())
            num_features += features.numel()
            outputs = outputs + tokens.flatten(0, 1).sum(0).cpu()
            num_tokens += tokens.shape[0] * tokens.shape[1]
        num_images += 1
    if not num_images:
        raise UserError("the sources have no images to measure features on")
    variance = squares / num_features - (total / num_features) ** 2
    return FeatureScale(max(variance, 0.0) ** 0.5, outputs / num_tokens, num_images, num_tokens)


@torch.inference_mode()
def output_distances(
    model: Any, processor: Any, images: Iterable[Image.Image], sigmas: Sequence[float], mean_output: Tensor
) -> list[tuple[float, float]]:
    """Per sigma, the mean cosine distance between clean and noisy visual tokens: (as they are, mean output subtracted).

    Visual tokens that all lie near one mean have a small distance whatever the noise does; the second number is free of
    that.
    """
    sums = torch.zeros(len(sigmas), 2, dtype=torch.float64)
    centre = mean_output.to(model.device)
    num_tokens = 0
    for image in images:
        for part in _tiles(model, processor, image):
            clean = model.get_image_features(part).pooler_output.flatten(0, 1).double()  # [N, D]
            num_tokens += len(clean)
            for row, sigma in zip(sums, sigmas, strict=True):
                with feature_noise(model, sigma):
                    noisy = model.get_image_features(part).pooler_output.flatten(0, 1).double()
                for column, shift in enumerate((torch.zeros_like(centre), centre)):
                    row[column] += float((1 - F.cosine_similarity(clean - shift, noisy - shift, dim=-1)).sum())
    return [(float(plain) / num_tokens, float(centred) / num_tokens) for plain, centred in sums]


def _tiles(model: Any, processor: Any, image: Image.Image) -> Iterator[Tensor]:
    """Tiles of an image on the model's device, a few at a time."""
    tiles = torch.from_numpy(processor.spec.cut(decode_image(image)))
    for part in tiles.split(_TILES):
        yield part.to(model.device)

"""Images to tiles as an image processor of transformers: uint8 pixels, which the model normalises, and counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, TensorType
from transformers.image_processing_utils import BaseImageProcessor

from alignvlm.exports import FoundInPackage, auto_map
from alignvlm.model.inputs.arguments import AlignVLMImagesKwargs, check_names
from alignvlm.model.inputs.images import read_images
from alignvlm.model.inputs.tiling import TilingSpec


class AlignVLMImageProcessor(FoundInPackage, BaseImageProcessor):
    """Cuts images into tiles.

    Args:
        tile_size, tokens_per_tile, max_tiles, min_coverage, overview: the fields of `TilingSpec`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers' convention)
    valid_kwargs: Any = AlignVLMImagesKwargs

    def __init__(
        self,
        tile_size: int,
        tokens_per_tile: int,
        max_tiles: int = 9,
        min_coverage: float = 0.9,
        overview: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.auto_map = auto_map("AutoImageProcessor")
        self.tile_size = tile_size
        self.tokens_per_tile = tokens_per_tile
        self.max_tiles = max_tiles
        self.min_coverage = min_coverage
        self.overview = overview

    @property
    def spec(self) -> TilingSpec:
        """How images are cut."""
        return TilingSpec(self.tile_size, self.tokens_per_tile, self.max_tiles, self.min_coverage, self.overview)

    @property
    def size(self) -> dict[str, int]:
        """Height and width of a tile in pixels, under the name at which transformers and servers look."""
        return {"height": self.tile_size, "width": self.tile_size}

    def spec_with(self, **options: Any) -> TilingSpec:
        """`spec` with other `max_tiles`, `min_coverage` or `overview`; None leaves one as it is.

        Raises:
            TypeError: another option. ValueError: no tile is allowed.
        """
        check_names("AlignVLMImageProcessor", options, ("max_tiles", "min_coverage", "overview"))
        spec = replace(self.spec, **{name: value for name, value in options.items() if value is not None})
        if spec.max_tiles < 1:
            raise ValueError(f"max_tiles is {spec.max_tiles}; an image has at least one tile")
        return spec

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images as `read_image` takes them, as RGB PIL images in the same lists."""
        return read_images(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = None, **options: Any) -> BatchFeature:
        """The tiles of one image or of (nested) lists of images, in order.

        Returns:
            pixel_values uint8 [K, 3, S, S], the tiles of all images; num_tiles, a number per image.
        """
        spec = self.spec_with(**options)
        tiles = [spec.cut(image) for image in flat_images(self.fetch_images(images))]
        none = np.zeros((0, 3, spec.tile_size, spec.tile_size), np.uint8)
        data = {"pixel_values": np.concatenate(tiles or [none]), "num_tiles": [len(each) for each in tiles]}
        return BatchFeature(data, tensor_type=return_tensors)


def flat_images(images: Any) -> Iterable[Image.Image]:
    """The images of nested lists, in order."""
    if isinstance(images, list):
        for image in images:
            yield from flat_images(image)
    else:
        yield images

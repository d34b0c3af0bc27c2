"""Images to tiles: which grid, how many tiles and visual tokens, and the pixels. Everyone who counts calls this file.

The grid follows the coverage rule of Ovis that the paper cites: of all grids with at most `max_tiles` tiles, the
fewest tiles that keep more than `min_coverage` of the image's pixels (tie: more coverage), otherwise the most
coverage (tie: fewer tiles). The whole image comes first when there is more than one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

BACKGROUND = 255
"""Grey level of the margin around an image whose aspect ratio is not its grid's: paper white."""


@dataclass(frozen=True)
class TilingSpec:
    """What decides how many tiles and visual tokens an image of a given size becomes."""

    tile_size: int
    """Side of a square tile in pixels: the vision encoder's input."""
    tokens_per_tile: int
    """Visual tokens that the connector makes of one tile."""
    max_tiles: int = 9
    min_coverage: float = 0.9
    overview: bool = True

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) for an image of this size in pixels."""
        return _grid(width, height, self.tile_size, self.max_tiles, self.min_coverage)

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles of an image, the overview included."""
        rows, columns = self.grid(width, height)
        tiles = rows * columns
        return tiles + 1 if self.overview and tiles > 1 else tiles

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of an image: the one count that index, processor and model share."""
        return self.num_tiles(width, height) * self.tokens_per_tile

    def cut(self, image: Image.Image) -> np.ndarray:
        """The tiles of an RGB image, overview first, then row by row: uint8 [num_tiles, 3, tile_size, tile_size]."""
        return np.ascontiguousarray(self.cut_uncopied(image))

    def cut_uncopied(self, image: Image.Image) -> np.ndarray:
        """As `cut`, but a single tile is a view of the image with colours last, for callers that copy it anyway."""
        size = self.tile_size
        rows, columns = self.grid(*image.size)
        canvas = _fit(image, columns * size, rows * size)
        tiles = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
        if self.overview and rows * columns > 1:
            tiles = np.concatenate([_fit(image, size, size).transpose(2, 0, 1)[None], tiles])
        return tiles


@lru_cache(maxsize=65536)
def _grid(width: int, height: int, size: int, max_tiles: int, min_coverage: float) -> tuple[int, int]:
    if width < 1 or height < 1:
        raise ValueError(f"image size must be positive, got {width} x {height}")
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    coverage = {grid: _coverage(width / grid[1], height / grid[0], size) for grid in grids}
    good = [grid for grid in grids if coverage[grid] > min_coverage]
    if good:
        return min(good, key=lambda grid: (grid[0] * grid[1], -coverage[grid], grid))
    return min(grids, key=lambda grid: (-coverage[grid], grid[0] * grid[1], grid))


def _coverage(cell_width: float, cell_height: float, size: int) -> float:
    """Part of a cell's pixels that survive scaling it down (never up) into a tile."""
    return min(1.0, size / max(cell_width, cell_height)) * min(1.0, size / max(cell_width, cell_height))


def _fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """The image scaled to fit, aspect ratio kept, centred on a white canvas: uint8 [height, width, 3]."""
    if image.size == (width, height):
        return np.asarray(image)
    scale = min(width / image.width, height / image.height)
    new_size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.size != new_size:
        image = image.resize(new_size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
    top, left = (height - image.height) // 2, (width - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return canvas

"""Tiling: the coverage rule against a slow independent statement of it, and that counts and pixels agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alignvlm.model.inputs.tiling import TilingSpec

sizes = st.integers(1, 400)


def slow_grid(width: int, height: int, side: int, max_tiles: int) -> set[tuple[int, int]]:
    """All grids that Ovis' rule allows: its sorted lists, with exact instead of rounded partitions."""

    def covering(w: float, h: float) -> float:
        w, h = max(w, h), min(w, h)
        return side * (h / w * side) if w > side else w * h

    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    ratio = {g: g[0] * g[1] * covering(width / g[1], height / g[0]) / (width * height) for g in grids}
    ratio = {g: round(r, 9) for g, r in ratio.items()}
    good = [g for g in grids if ratio[g] > 0.9]
    keys = {g: (g[0] * g[1], -ratio[g]) if good else (-ratio[g], g[0] * g[1]) for g in good or grids}
    return {g for g, key in keys.items() if key == min(keys.values())}


@given(sizes, sizes, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_grid_follows_the_coverage_rule(width: int, height: int, max_tiles: int) -> None:
    spec = TilingSpec(tile_size=64, tokens_per_tile=16, max_tiles=max_tiles)
    assert spec.grid(width, height) in slow_grid(width, height, 64, max_tiles)


@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tiles_are_as_many_as_counted(width: int, height: int, overview: bool) -> None:
    spec = TilingSpec(tile_size=32, tokens_per_tile=4, overview=overview)
    tiles = spec.cut(Image.new("RGB", (width, height)))
    assert tiles.shape == (spec.num_tiles(width, height), 3, 32, 32)
    assert tiles.dtype == np.uint8
    assert spec.num_tokens(width, height) == 4 * len(tiles)


def test_small_and_page_sized_images() -> None:
    spec = TilingSpec(tile_size=384, tokens_per_tile=729)
    assert spec.num_tiles(300, 200) == 1
    assert spec.grid(768, 384) == (1, 2)
    assert spec.num_tiles(768, 384) == 3  # two tiles and the overview
    assert spec.num_tiles(5000, 5000) == 10


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1), (3, 60_000)])
def test_extreme_aspect_ratios_keep_some_ink(size: tuple[int, int]) -> None:
    spec = TilingSpec(tile_size=32, tokens_per_tile=4)
    tiles = spec.cut(Image.new("RGB", size))
    assert tiles.shape == (spec.num_tiles(*size), 3, 32, 32)
    assert all(tile.min() == 0 for tile in tiles)


def test_a_grid_of_exact_tiles_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    tiles = TilingSpec(tile_size=32, tokens_per_tile=4, overview=False).cut(Image.fromarray(pixels))
    rebuilt = tiles.reshape(2, 3, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(64, 96, 3)
    assert np.array_equal(rebuilt, pixels)


def test_a_single_tile_is_contiguous_unless_a_view_is_asked() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    spec = TilingSpec(tile_size=32, tokens_per_tile=4)
    assert spec.cut(image).flags.c_contiguous, "a model computes other layouts by other kernels"
    assert np.array_equal(spec.cut_uncopied(image), spec.cut(image))


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        TilingSpec(tile_size=32, tokens_per_tile=4).grid(0, 5)

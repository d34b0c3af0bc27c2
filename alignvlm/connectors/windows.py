"""Neighbouring features joined into one: windows of a tile's grid, padded with zeros where they do not divide it."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def num_windows(side: int, size: int) -> int:
    """Windows of this size along a side; the last one may reach beyond it."""
    return -(-side // size)


def join_windows(features: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Features [K, s x s, d] to [K, windows, rows x columns x d], both row by row, for windows of rows x columns.

    Zeros stand right of and below the grid where the last windows reach beyond it, as in Ovis.
    """
    rows, columns = window
    if rows == columns == 1:
        return features
    side = math.isqrt(features.shape[1])
    grid = features.unflatten(1, (side, side))
    if side % rows or side % columns:
        grid = F.pad(grid, (0, 0, 0, -side % columns, 0, -side % rows))
    blocks = grid.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [K, r, rows, c, columns, d]
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)

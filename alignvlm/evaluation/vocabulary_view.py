"""The vocabulary tokens with the largest probability, for every visual token of an image (ALIGN connector).

For a few images and in chunks: the probabilities themselves are held, which training never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alignvlm.connectors.align import AlignConnector
from alignvlm.model.inputs.tiling import TilingSpec
from data_pipeline.samples.images import decode_image

MAX_CELLS = 1024
"""Images with more visual tokens are shown by their first tile alone, which is the overview where there is one."""
CHUNK = 256
"""Visual tokens whose probabilities over the vocabulary are held at once."""


def probability_chunks(connector: AlignConnector, features: torch.Tensor) -> Iterator[torch.Tensor]:
    """P_vocab of features [N, d], at most CHUNK rows at a time: [n, V], or [n, V_active] by `active_ids`."""
    for chunk in features.split(CHUNK):
        yield connector.probabilities(chunk.to(connector.w1.weight.dtype))


def top_tokens(
    connector: AlignConnector, features: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest entries of every row of P_vocab (paper, section 3.2).

    Args:
        connector: an ALIGN connector.
        features: [N, d].

    Returns:
        Probabilities [N, k] fp32 in falling order, token ids [N, k], entropies [N] in nats.
    """
    values, ids, entropies = [], [], []
    with torch.no_grad():
        for chunk in probability_chunks(connector, features):
            p = chunk.float()
            value, index = p.topk(k, dim=-1)
            values.append(value)
            ids.append(connector.active_ids[index] if connector.is_restricted else index)
            entropies.append(-torch.xlogy(p, p).sum(-1))
    return torch.cat(values), torch.cat(ids), torch.cat(entropies)


def has_view(model: Any, processor: Any) -> bool:
    """Whether the connector is ALIGN and its visual tokens are a grid: others have no such view."""
    num_tokens = processor.spec.tokens_per_tile
    return model.config.connector_config["kind"] == "align" and math.isqrt(num_tokens) ** 2 == num_tokens


def vocabulary_view(model: Any, processor: Any, image: Image.Image, k: int = 5) -> dict[str, Any] | None:
    """Top-k tokens of every visual token of an image, with the place of each tile on the image.

    Returns:
        {"tiles": [{"box": [x0, y0, x1, y1] as fractions of the image, where the tokens of the tile lie (the last of a
        row or column may reach beyond the tile: `tiles.merge`), "side": visual tokens per tile side,
        "cells": row by row {"top": [[text, probability], …], "entropy": nats}}], "entropy": mean,
        "vocabulary": V}; None without such a view (`has_view`).
    """
    if not has_view(model, processor):
        return None
    spec: TilingSpec = processor.spec
    side = math.isqrt(spec.tokens_per_tile)
    image = decode_image(image)
    tiles, boxes = spec.cut(image), tile_boxes(spec, *image.size)
    shown = slice(1, None) if spec.overview and len(tiles) > 1 else slice(None)
    if len(tiles[shown]) * spec.tokens_per_tile > MAX_CELLS:
        shown = slice(0, 1)
    tiles, boxes = tiles[shown], boxes[shown]
    with torch.no_grad():
        features = model.model.encode_tiles(torch.from_numpy(tiles).to(model.device))  # [K, T, d]
    p, ids, entropy = top_tokens(model.model.connector, features.flatten(0, 1), k)
    texts = {i: token_text(processor.tokenizer, i) for i in set(ids.flatten().tolist())}
    cells = [
        {"top": [[texts[i], round(v, 5)] for i, v in zip(row_ids, row_p, strict=True)], "entropy": round(h, 4)}
        for row_ids, row_p, h in zip(ids.tolist(), p.tolist(), entropy.tolist(), strict=True)
    ]
    size = spec.tokens_per_tile
    reach = side * model.config.tiles_config["merge"] / model.config.patches_per_side
    grids = [(x0, y0, x0 + reach * (x1 - x0), y0 + reach * (y1 - y0)) for x0, y0, x1, y1 in boxes]
    return {
        "tiles": [
            {"box": [round(x, 5) for x in grid], "side": side, "cells": cells[i * size : (i + 1) * size]}
            for i, grid in enumerate(grids)
        ],
        "entropy": round(float(entropy.mean()), 4),
        "vocabulary": int(model.model.connector.w2.shape[0]),
    }


def tile_boxes(spec: TilingSpec, width: int, height: int) -> list[tuple[float, float, float, float]]:
    """Where each tile of `spec.cut` lies on an image, as fractions of it; margins reach outside [0, 1]."""
    rows, columns = spec.grid(width, height)
    boxes = [_cell_box(spec.tile_size, width, height, rows, columns, r, c) for r in range(rows) for c in range(columns)]
    if spec.overview and len(boxes) > 1:
        boxes.insert(0, _cell_box(spec.tile_size, width, height, 1, 1, 0, 0))
    return boxes


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as a reader can tell it from others: white space made visible, parts of characters as bytes."""
    text = tokenizer.decode([token_id]).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    if not text or "\ufffd" in text or not text.isprintable():
        name = str(tokenizer.convert_ids_to_tokens(token_id) or f"#{token_id}")
        to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
        return "".join(f"\\x{to_byte[c]:02x}" for c in name) if set(name) <= to_byte.keys() else name
    return text


def _cell_box(
    size: int, width: int, height: int, rows: int, columns: int, row: int, column: int
) -> tuple[float, float, float, float]:
    canvas_width, canvas_height = columns * size, rows * size
    scale = min(canvas_width / width, canvas_height / height)
    shown_width, shown_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (canvas_width - shown_width) // 2, (canvas_height - shown_height) // 2
    return (
        (column * size - left) / shown_width,
        (row * size - top) / shown_height,
        ((column + 1) * size - left) / shown_width,
        ((row + 1) * size - top) / shown_height,
    )

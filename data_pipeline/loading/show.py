"""One global batch as a web page: its packs to scale, and the images, tokens and labels of each document."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from html import escape
from io import BytesIO
from itertools import groupby

import numpy as np
from PIL import Image

from data_pipeline.order.batch import GlobalBatch, Packs
from data_pipeline.samples.schema import IGNORE_INDEX, Encoder, Sample, SampleError
from data_pipeline.shards.reader import SourceReader

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.bar { display: flex; height: 1.6rem; background: repeating-linear-gradient(45deg, #eee 0 6px, #fff 6px 12px); }
.bar a { display: block; overflow: hidden; font-size: .7rem; color: #222; padding: .2rem; text-decoration: none; }
.document { border-left: .4rem solid var(--c); padding: .2rem 0 .2rem .8rem; margin: 1rem 0; overflow-wrap: anywhere; }
.document img { max-height: 12rem; max-width: 100%; border: 1px solid #ccc; margin-right: .4rem; }
.tokens { font: 13px/1.9 ui-monospace, monospace; }
.t { border-bottom: 1px dotted #aaa; margin-right: 1px; } .s { background: var(--c); }
.v { border: 1px solid var(--c); border-radius: .3rem; padding: 0 .4rem; } .bad { color: #b00; }
"""
_MAX_SIDE = 640


def render_batch(
    batch: GlobalBatch,
    readers: list[SourceReader],
    encoder: Encoder,
    *,
    sequence_length: int,
    decode_token: Callable[[int], str],
    image_token_id: int,
    max_packs: int = 4,
    title: str = "",
) -> str:
    """A self-contained HTML page of the first `max_packs` packs of a batch.

    Supervised tokens have the document's colour behind them, the others a dotted line below; a run of visual tokens is
    one box.
    """
    tokens, tiles = batch.packs.totals()
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1><p>Step {batch.step}, epoch {batch.epoch}: {len(batch.packs)} packs of "
        f"{sequence_length} tokens, {len(batch.packs.index)} samples, {int(tokens.sum())} tokens, "
        f"{int(tiles.sum())} tiles, "
        f"{tokens.sum() / (len(batch.packs) * sequence_length):.1%} full. "
        "Coloured tokens are supervised, dotted ones are context.",
    ]
    for pack in range(min(max_packs, len(batch.packs))):
        documents = batch.packs.take(np.asarray([pack]))
        parts.append(f"<h2>Pack {pack}: {int(tokens[pack])} tokens, {int(tiles[pack])} tiles</h2>")
        parts.append(_bar(documents, pack, sequence_length))
        rows = zip(documents.source.tolist(), documents.index.tolist(), strict=True)
        for number, (source, index) in enumerate(rows):
            content = "".join(_document(readers[source], index, encoder, decode_token, image_token_id))
            parts.append(f'<div class=document id="p{pack}d{number}" style="--c:{_colour(number)}">{content}</div>')
    return "\n".join(parts) + "\n</html>\n"


def _bar(documents: Packs, pack: int, sequence_length: int) -> str:
    """The pack to scale."""
    boxes = (
        f'<a href="#p{pack}d{n}" '
        f'style="width:{100 * tokens / sequence_length:.3f}%;background:{_colour(n)}">{tokens}</a>'
        for n, tokens in enumerate(documents.tokens.tolist())
    )
    return f"<div class=bar>{''.join(boxes)}</div>"


def _document(
    reader: SourceReader, index: int, encoder: Encoder, decode_token: Callable[[int], str], image_token_id: int
) -> Iterator[str]:
    yield f"<b>{escape(reader.label(index))}</b>"
    try:
        sample = reader[index]
        encoded = encoder.encode(sample)
    except SampleError as error:
        yield f" <span class=bad>{escape(str(error))}</span>"
        return
    tiles = "1 tile" if len(encoded.tiles) == 1 else f"{len(encoded.tiles)} tiles"
    yield f" {len(encoded.input_ids)} tokens, {tiles}<br>{_images(sample)}<div class=tokens>"
    pairs = zip(encoded.input_ids.tolist(), (encoded.labels != IGNORE_INDEX).tolist(), strict=True)
    for visual, run in groupby(pairs, key=lambda pair: pair[0] == image_token_id):
        if visual:
            yield f"<span class=v>{sum(1 for _ in run)} visual tokens</span>"
        else:
            for token, supervised in run:
                text = escape(decode_token(token)).replace("\n", "⏎<br>") or "&nbsp;"
                yield f'<span class="{"s" if supervised else "t"}" title="{token}">{text}</span>'
    yield "</div>"


def _images(sample: Sample) -> str:
    return "".join(f'<img alt="" src="data:image/png;base64,{_thumbnail(image)}">' for image in sample.images)


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _colour(number: int) -> str:
    return f"hsl({number * 137 % 360} 70% 82%)"

"""The probability mass of every vocabulary token over many images, and an export with only those that carry it.

The paper finds that about 3.4K of 128K tokens matter after training; this measures it on the user's own images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from alignvlm.connectors.align import AlignConnector
from alignvlm.errors import UserError
from alignvlm.evaluation.items import spread
from alignvlm.evaluation.vocabulary_view import probability_chunks
from alignvlm.exports import save_export
from data_pipeline.files import to_json, write_atomic
from data_pipeline.samples.images import decode_image
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.reader import SourceReader

if TYPE_CHECKING:
    from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor

_TILES = 4
"""Tiles that go through the vision encoder at once."""


@dataclass(frozen=True)
class VocabularyMass:
    """Mean probability of every token over the visual tokens of some images."""

    mass: Tensor
    """[V] float64 on the CPU, sums to 1."""
    num_images: int
    num_visual_tokens: int
    mean_entropy: float
    """Mean entropy of one visual token's distribution over the vocabulary, in nats."""

    def active(self, keep_mass: float) -> Tensor:
        """The fewest token ids that hold `keep_mass` of the mass together, by falling mass: int64 [V_active]."""
        if not 0 < keep_mass <= 1:
            raise ValueError(f"keep_mass must be in (0, 1], not {keep_mass}")
        sorted_mass, ids = self.mass.sort(descending=True, stable=True)
        reached = sorted_mass.cumsum(0) >= keep_mass * sorted_mass.sum() * (1 - 1e-12)
        return ids[: int(reached.to(torch.int8).argmax()) + 1]

    def most_used(self, count: int) -> Tensor:
        """The `count` token ids with the largest mass, by falling mass. Raises UserError when there are fewer."""
        if count > len(self.mass):
            raise UserError(f"--num-active {count:,}: the vocabulary has {len(self.mass):,} tokens")
        return self.mass.sort(descending=True, stable=True).indices[:count]


def images_of(folders: Sequence[str | Path], count: int) -> Iterator[Image.Image]:
    """About `count` images of shards: as many from each folder, evenly spread over its samples, the first of each.

    Samples that cannot be read, or have no image, are left out.
    """
    for position, folder in enumerate(folders):
        reader = SourceReader(folder)
        wanted = count * (position + 1) // len(folders) - count * position // len(folders)
        for number in spread(len(reader), wanted):
            try:
                yield from reader[number].images[:1]
            except SampleError:
                continue


@torch.inference_mode()
def measure_mass(
    model: AlignVLMForConditionalGeneration, processor: AlignVLMProcessor, images: Iterable[Image.Image]
) -> VocabularyMass:
    """Average P_vocab of the model's ALIGN connector over all visual tokens of these images.

    Raises:
        UserError: another connector, a vocabulary that is restricted already, or no images.
    """
    connector = _align_connector(model)
    total = torch.zeros(connector.vocab_size, dtype=torch.float64, device=model.device)
    entropy = 0.0
    num_images = num_tokens = 0
    for image in images:
        tiles = torch.from_numpy(processor.spec.cut(decode_image(image)))
        for part in tiles.split(_TILES):
            features = model.model.encode_tiles(part.to(model.device)).flatten(0, 1)  # [N, d]
            for p in probability_chunks(connector, features):
                total += p.sum(dim=0, dtype=torch.float64)
                entropy -= float(torch.xlogy(p, p).sum(dtype=torch.float64))
                num_tokens += p.shape[0]
        num_images += 1
    if not num_images:
        raise UserError("the sources have no images; give --data a folder of shards with images")
    return VocabularyMass((total / num_tokens).cpu(), num_images, num_tokens, entropy / num_tokens)


def write_restricted(
    model: AlignVLMForConditionalGeneration,
    processor: AlignVLMProcessor,
    measured: VocabularyMass,
    ids: Tensor,
    folder: Path,
) -> dict[str, Any]:
    """Restrict the model (in place) to these tokens [V_active] and export it; returns the summary written."""
    _align_connector(model).keep_tokens(ids)
    model.config.connector_config["num_active"] = len(ids)
    save_export(model, model.state_dict(), processor, folder)
    top = ids[:20].tolist()
    summary = {
        "kept_mass": float(measured.mass[ids].sum()),
        "num_active": len(ids),
        "vocab_size": len(measured.mass),
        "images": measured.num_images,
        "visual_tokens": measured.num_visual_tokens,
        "largest_mean_probability": float(measured.mass.max()),
        "top": [[processor.tokenizer.decode([i]), float(measured.mass[i])] for i in top],
    }
    write_atomic(folder / "vocabulary.json", to_json(summary, indent=2, ensure_ascii=False))
    return summary


def _align_connector(model: Any) -> AlignConnector:
    connector = model.model.connector
    if not isinstance(connector, AlignConnector):
        kind = model.config.connector_config["kind"]
        raise UserError(f"the model's connector is {kind}: only align has probabilities over a vocabulary")
    if connector.is_restricted:
        raise UserError("the model's vocabulary is already restricted; analyse the export that it was made from")
    return connector

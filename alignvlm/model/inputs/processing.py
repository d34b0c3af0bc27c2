"""Images and conversations to model inputs, for training (`measure`, `encode`) and for inference (`__call__`).

Fulfils `data_pipeline.samples.schema.Encoder`. Pixels stay uint8: the model normalises them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from alignvlm.model.inputs.chat import CHATML, IMAGE, render_prompt, render_supervised
from alignvlm.model.inputs.tiling import TilingSpec
from alignvlm.model.inputs.tokenizer import ControlTokens
from data_pipeline.samples.images import ImageSource, decode_image
from data_pipeline.samples.schema import IGNORE_INDEX, Encoded, Sample, SampleError

ENCODING_VERSION = 2
"""Raised when a conversation gets other tokens than before, so that lengths are measured anew."""


class AlignVLMProcessor(ProcessorMixin):
    """Tokenizer and tiling of one model.

    Text of messages never becomes a control token or an image: what spells one is encoded as the text that it is.

    Args:
        tokenizer: a fast tokenizer; `<image>` is added to it when missing, ChatML when it has no chat template.
        tiling: fields of `TilingSpec`.
        max_text_tokens: text of a training sample is truncated after this many tokens; visual tokens never are.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        tiling: dict[str, Any] | None = None,
        max_text_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        template = chat_template or tokenizer.chat_template or CHATML
        super().__init__(tokenizer, chat_template=template)
        tokenizer.chat_template = template
        if IMAGE not in tokenizer.added_tokens_encoder:
            tokenizer.add_tokens([IMAGE], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tiling = dict(tiling or {})
        self.max_text_tokens = max_text_tokens
        self.spec = TilingSpec(**self.tiling)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a token or tile count could: of tokenizer, template, tiling and text limit."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str()
        state = [ENCODING_VERSION, tokenizer, self.chat_template, sorted(self.tiling.items()), self.max_text_tokens]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """What keeps text apart from the chat template's own tokens."""
        return ControlTokens(self.tokenizer)

    @property
    def tile_size(self) -> int:
        """Side of a tile, pixels."""
        return self.spec.tile_size

    def with_text_limit(self, max_text_tokens: int | None) -> AlignVLMProcessor:
        """This processor with another limit on a sample's text; the tokenizer is shared."""
        other = copy.copy(self)
        other.max_text_tokens = max_text_tokens
        return other

    def measure(self, messages: Sequence[Mapping[str, Any]], image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(tokens, visual ones included, and tiles) of a conversation with images of these (width, height).

        Raises:
            SampleError: the numbers of placeholders and images differ, or the conversation cannot be rendered.
        """
        text, _ = render_supervised(self.tokenizer, messages, self.control_tokens.escape)
        ids = self.control_tokens.encode(text)
        placeholders = ids.count(self.image_token_id)
        _check_placeholders(placeholders, len(image_sizes))
        num_text = len(ids) - placeholders
        if self.max_text_tokens is not None:
            num_text = min(num_text, self.max_text_tokens)
        visual = sum(self.spec.num_tokens(*size) for size in image_sizes)
        return num_text + visual, sum(self.spec.num_tiles(*size) for size in image_sizes)

    def encode(self, sample: Sample) -> Encoded:
        """One sample as arrays; labels are the assistant's tokens and -100 elsewhere.

        Raises:
            SampleError: as `measure`, or no token is supervised.
        """
        text, spans = render_supervised(self.tokenizer, sample.messages, self.control_tokens.escape)
        tokens, offsets = self.control_tokens.encode_with_offsets(text)
        ids = np.asarray(tokens, np.int64)
        starts = np.asarray(offsets, np.int64).reshape(-1, 2)[:, 0]
        labels = np.full_like(ids, IGNORE_INDEX)
        for begin, end in spans:
            said = (starts >= begin) & (starts < end)
            labels[said] = ids[said]
        ids, labels = self._cut_text(ids, labels)
        tiles = [self.spec.cut(image) for image in sample.images]
        ids, labels = self._expand(ids, labels, [len(t) for t in tiles])
        if not (labels[1:] != IGNORE_INDEX).any():
            raise SampleError("no supervised token: the conversation has no assistant turn within the text limit")
        none = np.zeros((0, 3, self.tile_size, self.tile_size), np.uint8)
        visual = np.flatnonzero(ids == self.image_token_id)
        return Encoded(ids, labels, np.concatenate(tiles) if tiles else none, visual)

    def prepare_generation(
        self, conversations: list[list[dict[str, Any]]], images: Sequence[Sequence[ImageSource]]
    ) -> BatchFeature:
        """Left-padded inputs of `generate` for conversations that await the assistant's turn.

        Returns:
            input_ids and attention_mask [B, T]; pixel_values uint8 [K, 3, S, S] when there are images.

        Raises:
            SampleError: a conversation that cannot be used.
        """
        rows: list[np.ndarray] = []
        tiles: list[np.ndarray] = []
        for messages, pictures in zip(conversations, images, strict=True):
            text = render_prompt(self.tokenizer, messages, self.control_tokens.escape)
            ids = np.asarray(self.control_tokens.encode(text), np.int64)
            cut = [self.spec.cut(decode_image(image)) for image in pictures]
            rows.append(self._expand(ids, ids, [len(t) for t in cut])[0])
            tiles += cut
        return self._batch(rows, tiles, "pt")

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Rendered text (`apply_chat_template(..., tokenize=False)`, one `<image>` per image) and images in order.

        Images are what `decode_image` takes, also in nested lists, and become the pixels that training sees.
        Control tokens in rendered text are control tokens, whoever wrote them: `prepare_generation` keeps them apart.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = _flat_images(images)
        tiles = [self.spec.cut(decode_image(image)) for image in flat]
        arrays = [np.asarray(ids, np.int64) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        placeholders = [int((ids == self.image_token_id).sum()) for ids in arrays]
        if sum(placeholders) != len(flat):
            raise ValueError(f"{len(flat)} images for {sum(placeholders)} {IMAGE} placeholders in the text")
        counts = iter([len(t) for t in tiles])
        rows = [
            self._expand(ids, ids, [next(counts) for _ in range(n)])[0]
            for ids, n in zip(arrays, placeholders, strict=True)
        ]
        return self._batch(rows, tiles, return_tensors)

    def _batch(self, rows: list[np.ndarray], tiles: list[np.ndarray], return_tensors: str) -> BatchFeature:
        """Rows of token ids, padded on the left, and all tiles."""
        length = max((len(r) for r in rows), default=0)
        input_ids = np.full((len(rows), length), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, length - len(row) :] = row
            mask[i, length - len(row) :] = 1
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if tiles:
            data["pixel_values"] = np.concatenate(tiles)
        return BatchFeature(data, tensor_type=return_tensors)

    def _cut_text(self, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.max_text_tokens is None:
            return ids, labels
        visual = ids == self.image_token_id
        kept = visual | (np.cumsum(~visual) <= self.max_text_tokens)
        return ids[kept], labels[kept]

    def _expand(self, ids: np.ndarray, labels: np.ndarray, tile_counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Each `<image>` becomes the visual tokens of its tiles."""
        places = np.flatnonzero(ids == self.image_token_id)
        _check_placeholders(len(places), len(tile_counts))
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = np.asarray(tile_counts, np.int64) * self.spec.tokens_per_tile
        return np.repeat(ids, repeats), np.repeat(labels, repeats)


def _check_placeholders(placeholders: int, images: int) -> None:
    if placeholders != images:
        raise SampleError(f"{placeholders} {IMAGE} placeholders in the text for {images} images")


def _flat_images(images: Any) -> list[ImageSource]:
    if images is None:
        return []
    if isinstance(images, ImageSource):
        return [images]
    return [image for entry in images for image in _flat_images(entry)]

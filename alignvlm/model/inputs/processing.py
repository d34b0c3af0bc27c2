"""Images and conversations to model inputs, for training (`measure`, `encode`) and for inference (`__call__`).

Fulfils `data_pipeline.samples.schema.Encoder`. Pixels stay uint8: the model normalises them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from alignvlm.exports import FoundInPackage, auto_map
from alignvlm.model.inputs.arguments import AlignVLMProcessorKwargs, check_arguments
from alignvlm.model.inputs.chat import CHATML, IMAGE, render_prompt, render_supervised
from alignvlm.model.inputs.image_processor import AlignVLMImageProcessor, flat_images
from alignvlm.model.inputs.prelude import with_prelude, without_prelude
from alignvlm.model.inputs.tiling import TilingSpec
from alignvlm.model.inputs.tokenizer import ControlTokens
from data_pipeline.checksums import digest
from data_pipeline.samples.images import ImageSource, decode_image
from data_pipeline.samples.schema import IGNORE_INDEX, Encoded, Sample, SampleError

ENCODING_VERSION = 2
"""Raised when a conversation gets other tokens than before, so that lengths are measured anew."""


class AlignVLMProcessor(FoundInPackage, ProcessorMixin):
    """Tokenizer and tiling of one model.

    `encode`, `measure` and `prepare_generation` never make a control token or an image of a message's text: what spells
    one is encoded as the text that it is. `__call__` and `apply_chat_template` are those of transformers.

    Args:
        image_processor: cuts the images into tiles.
        tokenizer: a fast tokenizer; `<image>` is added to it when missing, ChatML when it has no chat template.
        max_text_tokens: text of a training sample is truncated after this many tokens; visual tokens never are.
        chat_template: takes the place of the tokenizer's; the prelude that joins parts of messages is put before it.
    """

    valid_processor_kwargs: Any = AlignVLMProcessorKwargs
    image_token = IMAGE

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_tokens: int | None = None,
        chat_template: Any = None,
    ) -> None:
        template = with_prelude(chat_template or tokenizer.chat_template or CHATML)
        super().__init__(image_processor, tokenizer, chat_template=template)
        tokenizer.chat_template = template
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is saved
        if IMAGE not in tokenizer.added_tokens_encoder:
            tokenizer.add_tokens([IMAGE], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.auto_map = auto_map("AutoProcessor")
        self.max_text_tokens = max_text_tokens
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Image processor and tokenizer of a folder; older exports have the fields of the former in `tiling`."""
        former = (processor_dict or {}).get("tiling")
        if former is None:
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        return [
            AlignVLMImageProcessor(**former),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @property
    def spec(self) -> TilingSpec:
        """How images are cut."""
        return self.image_processor.spec

    @property
    def fingerprint(self) -> str:
        """Changes whenever a token or tile count could: of tokenizer, template, tiling and text limit."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # an earlier call's, as the truncation
        backend.no_truncation()
        template, tiling = without_prelude(self.chat_template or CHATML), sorted(asdict(self.spec).items())
        state = [ENCODING_VERSION, backend.to_str(), template, tiling, self.max_text_tokens]
        return digest(state)

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
        tiles = [self.spec.cut_uncopied(image) for image in sample.images]
        ids, labels = self._expand(ids, labels, [len(t) for t in tiles])
        if not (labels[1:] != IGNORE_INDEX).any():
            raise SampleError("no supervised token: the conversation has no assistant turn within the text limit")
        none = np.zeros((0, 3, self.tile_size, self.tile_size), np.uint8)
        visual = np.flatnonzero(ids == self.image_token_id)
        return Encoded(ids, labels, tiles[0] if len(tiles) == 1 else np.concatenate([none, *tiles]), visual)

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
        return self._batch(rows, tiles)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Images, and rendered text with one `<image>` for each, as inputs of the model.

        Control tokens in rendered text are control tokens, whoever wrote them: `prepare_generation` keeps them apart,
        `apply_chat_template(..., sanitize_control_tokens=True)` too.

        Args:
            images: one or a list of what `read_image` takes; for several texts in their order, or a list per text.
            text: a string, or a list of strings.
            kwargs: `AlignVLMProcessorKwargs`, flat or by kind (`text_kwargs={…}`): `return_tensors`,
                `padding` (on the left), `truncation`, `max_length`, `return_mm_token_type_ids`, `max_tiles`, …

        Returns:
            input_ids and attention_mask of every text; pixel_values uint8 [K, 3, S, S] when there are images.

        Raises:
            ValueError: neither is given, an image cannot be read, or images and placeholders of a row do not match.
            TypeError: an argument that is not known.
        """
        if any(kwargs.pop(kind, None) is not None for kind in ("videos", "audio")):  # transformers gives None
            raise ValueError("this model takes images and text, neither videos nor audio")
        check_arguments(kwargs)
        if text is not None and not (isinstance(text, str) or _is_list_of(str, text)):
            raise ValueError(
                f"text is {type(text).__name__}, not a string or a list of strings; "
                "images come first: processor(images=…, text=…)"
            )
        try:
            loaded = None if _is_empty(images) else self.image_processor.fetch_images(images)
        except ValueError as error:
            hint = "; text goes second or by name: processor(images=…, text=…)" if text is None else ""
            raise ValueError(f"{error}{hint}") from error
        if loaded is None and text is None:
            raise ValueError("neither images nor text: give one of them, or both")
        if isinstance(loaded, list) and any(isinstance(entry, list) for entry in loaded):
            loaded = [list(flat_images(entry)) for entry in loaded]  # a row may be one image or nested deeper
        return super().__call__(images=loaded, text=[text] if isinstance(text, str) else text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, *ignored: Any, **kwargs: Any) -> None:
        """Raises ValueError where images and placeholders differ, in a row or in all."""
        if text is None:
            return
        placeholders = [row.count(IMAGE) for row in text]
        if isinstance(images, list) and images and isinstance(images[0], list):
            if len(images) != len(text):
                raise ValueError(f"{len(images)} lists of images for {len(text)} texts")
            for number, (row, wanted) in enumerate(zip(images, placeholders, strict=True)):
                _check_images(len(row), wanted, f"row {number}: " if len(text) > 1 else "")
        else:
            _check_images(0 if images is None else len(list(flat_images(images))), sum(placeholders))

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What one `<image>` becomes: as many as the image has visual tokens."""
        return IMAGE * (int(image_inputs["num_tiles"][image_idx]) * self.image_processor.tokens_per_tile)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens and tiles of images of these (height, width): what vLLM plans with."""
        spec = self.image_processor.spec_with(**kwargs)
        sizes = [(width, height) for height, width in image_sizes or []]
        return MultiModalData(
            num_image_tokens=[spec.num_tokens(*size) for size in sizes],
            num_image_patches=[spec.num_tiles(*size) for size in sizes],
        )

    @property
    def unused_input_names(self) -> list[str]:
        """Names of the image processor's outputs that the model does not take."""
        return ["num_tiles"]

    def _batch(self, rows: list[np.ndarray], tiles: list[np.ndarray]) -> BatchFeature:
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
        return BatchFeature(data, tensor_type="pt")

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


def _check_images(given: int, wanted: int, row: str = "") -> None:
    if given != wanted:
        missing = "; a message's part has its image under 'image', 'url', 'path' or 'base64'" if given < wanted else ""
        raise ValueError(f"{row}{given} images for {wanted} {IMAGE} placeholders in the text{missing}")


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


def _is_empty(images: Any) -> bool:
    """Whether there is no image in (nested) lists."""
    return images is None or (isinstance(images, list | tuple) and all(map(_is_empty, images)))

"""An exported model as VLMEvalKit asks its models: one message of texts and image files, one reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from alignvlm.errors import UserError
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.benchmarks.base import FREE_LENGTH
from alignvlm.evaluation.items import Item
from data_pipeline.samples.images import decode_image
from data_pipeline.samples.schema import SampleError

Piece = dict[str, Any]
"""`{"type": "text" | "image", "value": text or path}`."""


class AlignVLM(BaseModel):
    """Greedy replies to messages with any number of images in any order, by the dataset's own prompts.

    Args:
        pretrained: the export folder.
        max_new_tokens: the longest reply; VLMEvalKit leaves it to the model.
        device: by default the GPU that VLMEvalKit has left visible to this process, else the CPU.
    """

    INTERLEAVE = True

    def __init__(self, pretrained: str, max_new_tokens: int = FREE_LENGTH, device: str | None = None) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens
        default = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.answerer = ModelAnswerer.load(pretrained, device or default)

    def generate_inner(self, message: Sequence[Piece], dataset: str | None = None) -> str:
        """The reply to a user's message. Raises UserError when it cannot be asked, with the file of a bad image."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, messages: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The reply to a conversation: `{"role": …, "content": pieces}` each."""
        images: list[Any] = []
        turns = []
        for message in messages:
            content = [_part(piece, images, dataset) for piece in message["content"]]
            turns.append({"role": message["role"], "content": content})
        try:
            (reply,) = self.answerer.answer([Item(str(dataset), 0, "", [], turns, images)], self.max_new_tokens)
        except SampleError as error:
            raise UserError(f"{dataset}: a message cannot be asked: {error}") from error
        return reply.strip()


def _part(piece: Piece, images: list[Any], dataset: str | None) -> dict[str, str]:
    if piece["type"] == "text":
        return {"type": "text", "text": piece["value"]}
    if piece["type"] != "image":
        raise UserError(f"{dataset} shows {piece['type']}: alignvlm reads text and images only")
    try:
        images.append(decode_image(piece["value"]))
    except (SampleError, OSError) as error:
        raise UserError(f"{dataset}: image {piece['value']}: {error}") from error
    return {"type": "image"}

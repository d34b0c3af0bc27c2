"""A conversation with an exported model about one or more images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError
from alignvlm.evaluation.answering import find_device, load_export
from alignvlm.exports import check_export
from data_pipeline.samples.images import decode_image
from data_pipeline.samples.schema import SampleError

if TYPE_CHECKING:
    from PIL import Image


class ChatSession:
    """Keeps the messages so far; `ask` answers one question."""

    def __init__(self, export: Path, images: list[Path], device: str | None = None, max_new_tokens: int = 128) -> None:
        check_export(export)
        self.images = [_open(path) for path in images]
        self.device = find_device(device)
        self.model, self.processor = load_export(export, self.device)
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str) -> str:
        """The answer to one more user message; the first one carries the images.

        Raises:
            UserError: the question cannot be asked; the conversation stays as it was.
        """
        parts: list[dict[str, str]] = [{"type": "image"} for _ in self.images] if not self.messages else []
        asked = [*self.messages, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        try:
            inputs = self.processor.prepare_generation([asked], [self.images]).to(self.device)
        except SampleError as error:
            raise UserError(f"this question cannot be asked: {error}") from error
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = self.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}]
        return answer.strip()


def _open(path: Path) -> Image.Image:
    try:
        return decode_image(path)
    except SampleError as error:
        raise UserError(f"{path}: not a readable image ({error})") from error

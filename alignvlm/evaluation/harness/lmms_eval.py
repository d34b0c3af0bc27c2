"""An exported model inside lmms-eval 0.7.3: `lmms-eval --model alignvlm --model_args pretrained=EXPORT --tasks …`.

lmms-eval makes the messages and scores the replies; here its requests become items in batches of like length.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image

from alignvlm.errors import UserError
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.batches import ahead, prepare_batch
from alignvlm.evaluation.benchmarks.base import FREE_LENGTH, before_any
from alignvlm.evaluation.benchmarks.replies import WINDOW
from alignvlm.evaluation.items import Item
from alignvlm.progress import Progress
from data_pipeline.samples.images import decode_image
from data_pipeline.samples.schema import SampleError

SAMPLING = ("temperature", "top_p", "top_k", "num_beams")
"""Settings of a task that go to `generate`, besides `do_sample`."""
FEW_SHOT_MARK = "\n\n"
"""lmms-eval lets every task stop there that names no other text: it ends examples, not replies."""
log = logging.getLogger(__name__)


class AlignVLM(lmms):
    """Tasks as conversations, with images where the task puts them.

    Args:
        pretrained: the export folder.
        device: such as `cuda:0`; by default this process's GPU, else the CPU.
        batch_size: requests that are answered together.
        max_new_tokens: the longest reply where the task states no limit.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = FREE_LENGTH,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f"--model_args: alignvlm has no setting {next(iter(unknown))!r}; it has pretrained, device, batch_size "
                "and max_new_tokens"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: alignvlm takes a number of requests, such as 16")
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.answerer = ModelAnswerer.load(str(pretrained), device)
        self._ignored: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return torch.device(self.answerer.device)

    def clean(self) -> None:
        """Give the model's memory back: what scores the replies may need it."""
        del self.answerer
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One reply per request, in their order; requests with other settings are never in one batch."""
        replies = [""] * len(requests)
        with Progress("alignvlm replies", len(requests), enabled=self.rank == 0) as bar:
            for numbers, settings, batch in ahead(self._batches(requests)):
                max_new_tokens, until, sampling = self._generation(settings)
                answers = batch.answers(self.answerer, max_new_tokens, until, **sampling)
                for number, answer in zip(numbers, answers, strict=True):
                    if isinstance(answer, SampleError):
                        name = f"{requests[number].task_name}, document {requests[number].doc_id}"
                        log.warning("%s cannot be asked and counts as an empty reply: %s", name, answer)
                    else:
                        replies[number] = before_any(answer, until)
                bar.advance(len(numbers))
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Per request the loss of its continuation, the mean over its tokens in nats, and whether it is greedy.

        A loss, since lmms-eval takes the smallest of a question's numbers for the model's choice. The pair is wrapped,
        since lmms-eval 0.7.3 makes a text of a bare one. The context is plain text without the chat template.

        Raises:
            UserError: a request has images.
        """
        found: list[GenerationResult] = []
        questions = _by_context(self._plain(request) for request in requests)
        for start in range(0, len(questions), self.batch_size):
            for likely in self.answerer.log_likelihoods(questions[start : start + self.batch_size]):
                found += [GenerationResult((-each.log / each.tokens, each.is_greedy)) for each in likely]
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: each of its tasks has a protocol of its own."""
        raise NotImplementedError("alignvlm answers single questions: leave out tasks of several rounds")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], Mapping[str, Any], Any]]:
        """(numbers of requests, their settings, batch)."""
        window = WINDOW * self.batch_size
        for first in range(0, len(requests), window):
            asked: dict[str, list[tuple[int, int, Item]]] = {}
            settings = {}
            for number, request in enumerate(requests[first : first + window], start=first):
                item, how = self._item(request), self._settings(request)
                key = json.dumps(how, sort_keys=True, default=str)
                settings[key] = how
                asked.setdefault(key, []).append((self._length(item), number, item))
            for key, entries in asked.items():
                entries.sort(key=lambda entry: entry[:2])
                for start in range(0, len(entries), self.batch_size):
                    batch = entries[start : start + self.batch_size]
                    items = [item for *_, item in batch]
                    yield [number for _, number, _ in batch], settings[key], prepare_batch(self.answerer, items)

    def _length(self, item: Item) -> int:
        """About how many tokens a prompt has."""
        sizes = [image.size for image in item.images if isinstance(image, Image.Image)]
        visual = sum(self.answerer.visual_tokens(*size) for size in sizes)
        return visual + len(item.question) // 4

    def _doc(self, request: Instance) -> Any:
        """The request's row of its dataset."""
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2] or {}

    def _item(self, request: Instance) -> Item:
        conversation = ChatMessages(messages=request.args[1](self._doc(request)))
        images: list[Any] = []
        messages = []
        for message in conversation.messages:
            parts = [_part(part, images, request.task_name) for part in message.content]
            messages.append({"role": message.role, "content": parts})
        return _named(request, messages, images)

    def _generation(self, settings: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """(longest reply, texts that end it, settings of sampling or beams) of a task's generation_kwargs."""
        known = {"max_new_tokens", "until", "do_sample", *SAMPLING}
        for name in sorted(set(settings) - known - self._ignored):
            self._ignored.add(name)
            log.warning("generation_kwargs: alignvlm has no %r (%r), it is ignored", name, settings[name])
        until = settings.get("until") or []
        texts = [text for text in ([until] if isinstance(until, str) else until) if text and text != FEW_SHOT_MARK]
        sampled = bool(settings.get("do_sample", settings.get("temperature"))) and settings.get("temperature") != 0
        names = SAMPLING if sampled else ("num_beams",)
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        return int(settings.get("max_new_tokens") or self.max_new_tokens), texts, {"do_sample": sampled} | given

    def _plain(self, request: Instance) -> tuple[str, str]:
        """(context, continuation) of a request without images."""
        context, continuation, *rest = request.args
        if rest:
            doc = self._doc(request)
            if rest[0](doc):
                raise UserError(
                    f"{request.task_name}: alignvlm compares likelihoods of text without images only; take a task that "
                    "generates its reply"
                )
            continuation = continuation if isinstance(continuation, str) else str(continuation(doc))
        return context, continuation


class AlignVLMSimple(AlignVLM):
    """Tasks as one text behind its images; `--force_simple` takes it, which tasks by likelihood need."""

    is_simple = True

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[1] or {}

    def _item(self, request: Instance) -> Item:
        context, _, doc_to_visual, *_ = request.args
        images = list(doc_to_visual(self._doc(request)) or [])
        parts = [{"type": "image"} for _ in images]
        return _named(request, [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}], images)


def _part(part: Any, images: list[Any], task: str) -> dict[str, str]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type != "image":
        raise UserError(f"{task} shows {part.type}: alignvlm reads text and images only")
    images.append(part.url)
    return {"type": "image"}


def _named(request: Instance, messages: list[dict[str, Any]], images: list[Any]) -> Item:
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    return Item(
        f"{request.task_name}/{request.doc_id}", 0, "".join(texts), [], messages, [_decoded(image) for image in images]
    )


def _decoded(image: Any) -> Any:
    """The upright pixels; the image itself when it cannot be read, which is named when it is asked."""
    try:
        return decode_image(image)
    except SampleError:
        return image


def _by_context(asked: Iterator[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Neighbouring requests with the same context together: the options of a question."""
    together: list[tuple[str, list[str]]] = []
    for context, continuation in asked:
        if together and together[-1][0] == context:
            together[-1][1].append(continuation)
        else:
            together.append((context, [continuation]))
    return together

"""Asks a model the questions of a benchmark: in batches of like length, shared by ranks, kept as the replies come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm.evaluation.answering import Answerer
from alignvlm.evaluation.batches import Batch, ahead, prepare_batch
from alignvlm.evaluation.benchmarks.base import Part, Question
from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.items import Item
from alignvlm.progress import Progress
from alignvlm.run_folder import WAY_OUT
from alignvlm.system.ranks import Ranks
from data_pipeline.files import JsonLinesLog, must_write, read_json_lines
from data_pipeline.samples.images import decode_image, image_size
from data_pipeline.samples.schema import SampleError

WINDOW = 4
"""Batches whose questions are sorted by length together, and answered by one rank."""
Row = dict[str, Any]


def ask(
    job: Job, load: Callable[[], Answerer], parts: Path, batch_size: int, ranks: Ranks, progress: bool = False
) -> None:
    """Answer this rank's windows of questions with the model that `load` gives, and append the replies to its part."""
    answerer = load()
    with must_write(parts, WAY_OUT):
        parts.mkdir(parents=True, exist_ok=True)
    done = {row["index"] for path in parts.glob("*.jsonl") for row in read_json_lines(path, {"index": int})}
    part = JsonLinesLog(parts / f"{ranks.rank}-of-{ranks.size}.jsonl")
    mine = lambda number: number // (WINDOW * batch_size) % ranks.size == ranks.rank
    shown = job.end if job.end is None else sum(map(mine, range(job.end)))
    try:
        with Progress(job.benchmark.title, shown, enabled=progress and ranks.is_main, beat=ranks.beat) as bar:
            before = time.monotonic()
            for asked in ahead(batches(job, answerer, mine, done, batch_size)):
                rows = asked.rows(job, answerer)
                seconds = (time.monotonic() - before) / max(len(rows), 1)
                for row in rows:
                    part.append(row | ({} if "error" in row else {"seconds": round(seconds, 4)}))
                bar.advance(asked.size)
                before = time.monotonic()
    finally:
        part.close()


@dataclass
class _Asked:
    """A batch that is ready for the model."""

    size: int
    """Rows of the file that it stands for."""
    questions: list[tuple[int, Question, list[Part]]] = field(default_factory=list)
    """Number, question and message."""
    unusable: list[Row] = field(default_factory=list)
    batch: Batch | None = None
    """Inputs for `generate`; None where the benchmark's replies are not generated but chosen by their likelihood."""

    def rows(self, job: Job, answerer: Answerer) -> list[Row]:
        """One line per question: its raw reply, or the error where it cannot be asked."""
        how, rows = job.benchmark.flavours[job.flavour], list(self.unusable)
        if self.batch is None:
            replies = _most_likely(job.benchmark.continuations, answerer, self.questions)
        else:
            replies = self.batch.answers(answerer, how.max_new_tokens, how.until)
        for (number, question, content), reply in zip(self.questions, replies, strict=True):
            row = {"index": number, "id": question.id}
            if isinstance(reply, SampleError):
                rows.append(row | {"error": str(reply)})
            else:
                text = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
                rows.append(row | {"prompt": text, "reply": reply, "gold": question.gold})
        return rows


def batches(
    job: Job, answerer: Answerer, mine: Callable[[int], bool], done: set[int], batch_size: int
) -> Iterator[_Asked]:
    """This rank's batches, with the inputs of those that are not done."""
    for questions in _windows(job, mine, WINDOW * batch_size):
        ordered = sorted(questions, key=lambda asked: (_length(asked[1], answerer), asked[0]))
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            is_done = {number for number, _ in batch} <= done
            yield _Asked(len(batch)) if is_done else _prepared(job, answerer, batch)


def _windows(job: Job, mine: Callable[[int], bool], size: int) -> Iterator[list[tuple[int, Question]]]:
    """This rank's questions, those of one window of rows together."""
    window: list[tuple[int, Question]] = []
    current = -1
    for number, record in job.reader.records(mine, job.end):
        if number // size != current:
            if window:
                yield window
            window, current = [], number // size
        window.append((number, job.benchmark.question(job.reader.layout, number, record)))
    if window:
        yield window


def _length(question: Question, answerer: Answerer) -> int:
    """About how many tokens a prompt has: those of its pictures, and one per four letters."""
    tokens = 0
    for image in question.images:
        try:
            tokens += answerer.visual_tokens(*image_size(image if isinstance(image, bytes) else image.read_bytes()))
        except SampleError:  # named when it is decoded
            continue
    return tokens + (len(question.text) + sum(map(len, question.options.values()))) // 4


def _prepared(job: Job, answerer: Answerer, questions: Sequence[tuple[int, Question]]) -> _Asked:
    """A batch with its pictures decoded and its texts encoded."""
    asked, items = _Asked(len(questions)), []
    for number, question in questions:
        content, pictures = job.benchmark.flavours[job.flavour].message(question)
        try:
            images = [decode_image(picture) for picture in pictures]
        except SampleError as error:
            asked.unusable.append({"index": number, "id": question.id, "error": str(error)})
            continue
        asked.questions.append((number, question, content))
        items.append(Item(question.id, 0, question.text, [], [{"role": "user", "content": content}], images))
    if not job.benchmark.continuations:
        asked.batch = prepare_batch(answerer, items)
    return asked


def _most_likely(
    continuations: Sequence[str], answerer: Answerer, asked: Sequence[tuple[int, Question, list[Part]]]
) -> list[str | SampleError]:
    """For each question, the continuation that the model finds most likely, stripped."""
    prompts = ["".join(part["text"] for part in content) for _, _, content in asked]
    found = answerer.log_likelihoods([(prompt, continuations) for prompt in prompts]) if prompts else []
    logs = [[each.log for each in likely] for likely in found]
    return [continuations[each.index(max(each))].strip() for each in logs]

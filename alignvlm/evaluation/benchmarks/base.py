"""What a benchmark is: where its rows come from, what is asked, how replies are scored; and all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers import Docowl, Record, Source, Tsv
from alignvlm.metrics import find_metric
from alignvlm.metrics.relaxed_accuracy import answers_in_cell, without_newlines
from data_pipeline.errors import nearest

Part = dict[str, str]
"""A piece of the user's message: `{"type": "text", "text": …}`, or `{"type": "image"}` for the next image, or with
`"image": "2"` for the one of that number, from 0."""
Scores = dict[str, tuple[float, float]]
"""Score -> what a unit adds above the line and below it: (0.5, 1) of a mean, (hits, tries) of a rate."""
Gold = dict[str, Any]

SHORT = "{}\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FREE_LENGTH = 512
"""Tokens of a reply where the evaluator leaves the limit to the model."""


@dataclass(frozen=True)
class Question:
    """One question to the model."""

    id: str
    text: str
    images: list[bytes | Path]
    gold: Gold
    """What scoring needs, as JSON: it is kept beside the reply."""
    options: dict[str, str] = field(default_factory=dict)
    """Letter -> text, of a choice."""


@dataclass(frozen=True)
class Flavour:
    """How one published evaluator asks and scores."""

    prompt: str | Callable[[Question], str | list[Part]] = SHORT
    """Text with `{}` for the question, or what makes the text, or the whole message, from a question."""
    max_new_tokens: int = FREE_LENGTH
    metric: str = ""
    """Name of the metric, where it is a registered one."""
    until: tuple[str, ...] = ()
    """The reply ends before the first of these."""
    one_line: bool = False
    """Whether newline characters of a reply are deleted."""
    layouts: tuple[str, ...] = ()
    """Layouts whose rows have what it needs; empty: all."""

    def message(self, question: Question) -> tuple[list[Part], list[bytes | Path]]:
        """The user's message and its images in order: in front of the text, unless the benchmark places them."""
        text = self.prompt.replace("{}", question.text) if isinstance(self.prompt, str) else self.prompt(question)
        if isinstance(text, str):
            return [*({"type": "image"} for _ in question.images), {"type": "text", "text": text}], question.images
        following = iter(range(len(question.images)))
        shown = [int(part.get("image") or next(following)) for part in text if part["type"] == "image"]
        parts = [part if part["type"] == "text" else {"type": "image"} for part in text]
        return parts, [question.images[number] for number in shown]

    def clean(self, reply: str) -> str:
        """The part of a raw reply that is scored."""
        reply = before_any(reply, self.until)
        return without_newlines(reply) if self.one_line else reply.strip()


def before_any(reply: str, marks: Sequence[str]) -> str:
    """The reply up to the first of the marks."""
    for mark in marks:
        reply = reply.partition(mark)[0]
    return reply


class Benchmark:
    """A published benchmark. One subclass each; the first flavour is the default."""

    name: ClassVar[str]
    title: ClassVar[str]
    published_items: ClassVar[int]
    """Size of the published set."""
    verified_items: ClassVar[bool] = True
    """Whether that size was counted, not only stated somewhere."""
    sources: ClassVar[Mapping[str, Source]]
    """Layout -> its files."""
    flavours: ClassVar[Mapping[str, Flavour]]
    judged: ClassVar[bool] = False
    """Whether there is no score without a judge's."""
    continuations: ClassVar[tuple[str, ...]] = ()
    """The most likely of these is the reply, instead of a generated one."""
    headline: ClassVar[str] = "score"
    """The score that stands for the benchmark."""

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A row of the layout as a question."""
        raise NotImplementedError

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """What a cleaned reply adds to each score."""
        return {"score": (find_metric(self.flavours[flavour].metric)(reply, gold["answers"]), 1)}

    def units(self, rows: Sequence[Mapping[str, Any]], flavour: str) -> list[Scores]:
        """What every unit of the benchmark adds: a question, unless its metric is about documents."""
        how = self.flavours[flavour]
        return [self.score(how.clean(row["reply"]), row["gold"], flavour) for row in rows]

    def combine(self, rates: dict[str, Any]) -> dict[str, Any]:
        """All scores from the quotients of sums, of numbers or of arrays of them; the headline is among them."""
        return rates

    def expected_items(self, layout: str) -> tuple[int, ...]:
        """Numbers of rows that published sets have in a layout."""
        return (self.published_items,)

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What a judge elsewhere reads, as JSON; None where nobody does."""
        return None

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a reader of the score must know about these rows."""
        return []

    def flavour(self, name: str | None, layout: str | None = None) -> str:
        """A flavour that can score rows of the layout (None: any), by default the first. Raises UserError."""
        fitting = [key for key, how in self.flavours.items() if layout is None or layout in (how.layouts or [layout])]
        if name is None:
            if not fitting:
                raise UserError(f"{self.name}: no flavour scores rows of layout {layout}")
            return fitting[0]
        if name not in self.flavours:
            raise UserError(f"{self.name} has no flavour {name!r}: {nearest(name, self.flavours)}")
        if name not in fitting:
            needed = ", ".join(self.flavours[name].layouts)
            raise UserError(f"{self.name}: flavour {name!r} needs layout {needed}, this is {layout}")
        return name


_BENCHMARKS: dict[str, Benchmark] = {}
B = TypeVar("B", bound=type[Benchmark])


def register_benchmark(benchmark: B) -> B:
    """Class decorator: the benchmark is known by its name. Raises ValueError when the name is taken."""
    if benchmark.name in _BENCHMARKS and type(_BENCHMARKS[benchmark.name]).__qualname__ != benchmark.__qualname__:
        raise ValueError(f"the benchmark name {benchmark.name!r} is taken")
    _BENCHMARKS[benchmark.name] = benchmark()
    return benchmark


def benchmark_names() -> list[str]:
    """Names of all benchmarks, in the order of their registration."""
    return list(_BENCHMARKS)


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by name. Raises UserError with the nearest name."""
    if name not in _BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}: {nearest(name, _BENCHMARKS)}")
    return _BENCHMARKS[name]


def owners_of(file: Path) -> list[str]:
    """Benchmarks whose published files have this file's name, where the name tells benchmarks apart."""
    return [
        name
        for name, benchmark in _BENCHMARKS.items()
        if any(
            file.stem in source.published for source in benchmark.sources.values() if isinstance(source, Tsv | Docowl)
        )
    ]


def of_tsv(number: int, record: Record) -> Question:
    """A row of VLMEvalKit's question-answer files: an answer that is a list has several."""
    return Question(
        record.text("index"), record.text("question"), record["images"], {"answers": answers_in_cell(record["answer"])}
    )


def of_docowl(number: int, record: Record, variants: bool = False) -> Question:
    """A line of DocDownstream or UReader; the accepted answers are those of `meta/` where it is there.

    Args:
        variants: whether an answer's variants are accepted, as ANLS has it, not its several values.
    """
    answers = [record["answer"]]
    if "document" in record:
        value = annotation(record)["values"]
        answers = (value[0].get("value_variants") if variants else None) or [member["value"] for member in value]
    return Question(str(number), record.text("question"), [record.image("image")], {"answers": answers})


def annotation(record: Record) -> Mapping[str, Any]:
    """What `document.jsonl` says about a line's question. Raises UserError when it has nothing about it."""
    for item in record["document"]["annotations"]:
        if item["key"] == record["original_question"] and item["values"]:
            return item
    asked, name = record["original_question"], record["name"]
    raise UserError(f"{record.place}: document.jsonl has no answer to {asked!r} about document {name!r}")

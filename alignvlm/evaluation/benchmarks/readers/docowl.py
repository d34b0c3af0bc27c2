"""DocDownstream (mPLUG-DocOwl) and UReader files: one question per JSON line, the untouched ones in `meta/`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers.records import Record, Wanted, existing
from data_pipeline.files import has_shape

IMAGE_MARK = "<|image|>"
VALUE = {"value": str, "value_variants?": [str]}
DOCUMENT = {"name": str, "annotations": [{"key": str, "values": [VALUE]}]}
"""A line of document.jsonl, as the DUE evaluator has it."""


@dataclass(frozen=True)
class Docowl:
    """Which file of the collection a benchmark reads."""

    dataset: str
    skips_documents: bool = False
    """Whether the collection is known to lack images of some documents."""

    @property
    def published(self) -> tuple[str, ...]:
        """Names of its published files, without endings: of DocDownstream and of UReader."""
        return f"{self.dataset}_test", f"test_{self.dataset}"


@dataclass(frozen=True)
class Meta:
    """What `meta/<dataset>/test` adds: per line its document and untouched question, and every document's answers."""

    names: list[str]
    questions: list[str]
    documents: dict[str, Mapping[str, Any]]
    missing: list[str]
    """Documents that no line asks about."""


class DocowlReader:
    """Lines of a `<dataset>_test.jsonl`."""

    def __init__(self, file: Path, source: Docowl, layout: str) -> None:
        self.files, self.layout, self.notes = [file], layout, list[str]()
        self.root = _root_of(file)
        with file.open("rb") as lines:
            self.size: int | None = sum(1 for line in lines if line.strip())
        if self.size == 0:
            raise UserError(f"{file}: the file is empty")
        folder = self.root / "meta" / source.dataset / "test"
        self.meta = _read_meta(folder, self.size, source) if layout == "docdownstream" and folder.is_dir() else None
        if self.meta is not None:
            self.files += [folder / "metadata.jsonl", folder / "document.jsonl"]
            if self.meta.missing:
                lacking = f"{len(self.meta.missing):,} documents of document.jsonl, such as {self.meta.missing[0]!r}"
                self.notes.append(f"no question is about {lacking}")

    def records(self, wanted: Wanted, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Rows with `question`, `answer`, `image` (a file), and where there is `meta/`: `name` and `document`."""
        file = self.files[0]
        with file.open("rb") as stream:
            lines = (line for line in stream if line.strip())
            for number, line in enumerate(lines):
                if end is not None and number >= end:
                    return
                if wanted(number):
                    yield number, self._record(line, number, f"{file}, line {number + 1}")

    def end(self, limit: int) -> int:
        """The questions about one document stay together."""
        assert self.size is not None
        if self.meta is None:
            return min(limit, self.size)
        names = self.meta.names
        while 0 < limit < len(names) and names[limit] == names[limit - 1]:
            limit += 1
        return min(limit, self.size)

    def _record(self, line: bytes, number: int, place: str) -> Record:
        try:
            row = Record(json.loads(line), place)
            question, answer = _conversation(row)
            image = row["image"][0] if isinstance(row["image"], list) else row["image"]
            file = existing(self.root, image, place, "image")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{place}: not a question with an image ({type(error).__name__}: {error})") from error
        record = Record({"question": question, "answer": answer, "image": file, "file_name": image}, place)
        if self.meta is not None:
            name = self.meta.names[number]
            record |= {
                "name": name,
                "original_question": self.meta.questions[number],
                "document": self.meta.documents[name],
            }
        return record


def open_docowl(path: Path, source: Docowl, layout: str) -> DocowlReader:
    """The benchmark's file of a collection, or a given file.

    Raises:
        UserError: there is none, it is empty, or `meta/` does not fit it.
    """
    if path.is_file():
        return DocowlReader(path, source, layout)
    own, older = (f"{name}.jsonl" for name in source.published)
    names = (f"test/{own}", own, older)
    for name in names:
        if (path / name).is_file():
            return DocowlReader(path / name, source, layout)
    raise UserError(f"{path}: there is no {' or '.join(names)}")


def _root_of(file: Path) -> Path:
    """The folder that image paths begin at: the nearest above with `imgs` or `meta`, else the file's own."""
    for folder in list(file.absolute().parents)[:3]:
        if (folder / "imgs").is_dir() or (folder / "meta").is_dir():
            return folder
    return file.absolute().parent


def _conversation(row: Record) -> tuple[str, str]:
    if "messages" in row:
        turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise ValueError("a line has one user message and one of the assistant")
        return turns[0][1].replace(IMAGE_MARK, ""), turns[1][1]
    _, asked, answered = row["conversations"]
    return asked["value"], answered["value"]


def _read_meta(folder: Path, size: int, source: Docowl) -> Meta:
    """Names and questions of all lines, checked against the documents by name and order."""
    lines, documents = _json_lines(folder / "metadata.jsonl"), _json_lines(folder / "document.jsonl")
    for number, document in enumerate(documents, start=1):
        if not has_shape(document, DOCUMENT):
            raise UserError(
                f"{folder / 'document.jsonl'}, line {number}: not a document with a name and annotations of a key and "
                'values, {"name": …, "annotations": [{"key": …, "values": [{"value": …}]}]}'
            )
    if len(lines) != size:
        raise UserError(f"{folder / 'metadata.jsonl'}: {len(lines)} lines for {size} questions; they must correspond")
    try:
        names = [Path(line["file_name"]).name.partition(".pdf")[0] for line in lines]
        questions = [json.loads(line["ground_truth"])["gt_parses"][0]["question"] for line in lines]
        order = [document["name"] for document in documents]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{folder}: not the files of DocDownstream ({type(error).__name__}: {error})") from error
    position, missing = 0, []
    for number, (name, _) in enumerate(groupby(names), start=1):
        while position < len(order) and order[position] != name:
            missing.append(order[position])
            position += 1
        if position == len(order) or (missing and not source.skips_documents):
            expected = missing[0] if missing else "no further one"
            raise UserError(
                f"{folder}: document {number} of metadata.jsonl is {name!r}, that of document.jsonl is {expected!r}; "
                "answers would be compared with those of another document"
            )
        position += 1
    missing += order[position:]
    if missing and not source.skips_documents:
        raise UserError(f"{folder / 'document.jsonl'}: no question is about document {missing[0]!r}")
    if len(set(order)) != len(order):
        repeated = next(name for name in order if order.count(name) > 1)
        raise UserError(f"{folder / 'document.jsonl'}: document {repeated!r} is there twice")
    return Meta(names, questions, {document["name"]: document for document in documents}, missing)


def _json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in file.read_bytes().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there; without it remove the folder `meta` too") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON lines ({error})") from error
    return rows

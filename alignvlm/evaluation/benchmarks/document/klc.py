"""Kleister Charity (KLC), test: eight fields of annual reports."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.base import Flavour, Gold, Question, register_benchmark
from alignvlm.evaluation.benchmarks.document.forms import Forms
from alignvlm.evaluation.benchmarks.readers import Docowl, Original, Record
from alignvlm.metrics.tables.due_f1 import ABSENT

KEYS = (
    "address__post_town", "address__postcode", "address__street_line", "charity_name", "charity_number",
    "income_annually_in_british_pounds", "report_date", "spending_annually_in_british_pounds",
)  # fmt: skip
TEMPLATE = "What is the value for the {}?"
WRITTEN = str.maketrans(" :", "__")
"""How the authors' files write values."""


def _documents(expected: Path) -> Iterator[dict[str, Any]]:
    """A row per document and field of the authors' `expected.tsv`, with the document's name from `in.tsv` beside it."""
    lines = [line.split() for line in expected.read_text(encoding="utf-8").split("\n")]
    lines = lines[:-1] if lines and not lines[-1] else lines
    names = _names(expected)
    if len(names) != len(lines):
        raise UserError(f"{expected}: {len(lines):,} lines for the {len(names):,} documents of in.tsv beside it")
    for number, (name, pairs) in enumerate(zip(names, lines, strict=True), start=1):
        annotations: dict[str, list[dict[str, str]]] = {}
        for pair in pairs:
            key, mark, value = pair.partition("=")
            if not mark or key not in KEYS:
                raise UserError(
                    f"{expected}, line {number}: {pair[:80]!r} must be key=value with one of the keys {', '.join(KEYS)}"
                )
            annotations.setdefault(key, []).append({"value": value})
        listed = [{"key": key, "values": values} for key, values in annotations.items()]
        for key in KEYS:
            yield {"name": name, "key": key, "annotations": listed}


def _names(expected: Path) -> list[str]:
    """The first column of `in.tsv` or `in.tsv.xz`, without `.pdf`; the other columns hold the documents' text."""
    for file, opened in ((expected.with_name("in.tsv"), open), (expected.with_name("in.tsv.xz"), lzma.open)):
        if file.is_file():
            try:
                with opened(file, "rb") as stream:
                    first = [line.split(b"\t", 1)[0].decode() for line in stream]
            except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: its documents cannot be read ({error})") from error
            return [name.removesuffix(".pdf") for name in first]
    raise UserError(f"{expected}: in.tsv or in.tsv.xz, which names the documents of its lines, is not beside it")


@register_benchmark
class KleisterCharity(Forms):
    """609 documents with 8 fields each; a question shows one page, the references are of the whole report.

    The authors' files hold no pictures: `images/<document>.png` are the reader's own renderings.
    """

    name = "klc"
    title = "KLC"
    published_items = 4872
    sources = MappingProxyType(
        {
            "docdownstream": Docowl("KleisterCharity"),
            "ureader": Docowl("KleisterCharity"),
            "original": Original(
                ("expected.tsv",), read=_documents, together="name",
                image=lambda row: row["name"] + ".png", image_folders=("images", "../images"),
            ),
        }
    )  # fmt: skip
    flavours = MappingProxyType(
        {
            "docowl": Flavour("{}", layouts=("docdownstream", "ureader")),
            "official": Flavour("{}", layouts=("original",)),
        }
    )
    keys = KEYS

    def question(self, layout: str, number: int, record: Record) -> Question:
        """The question about one field."""
        if layout != "original":
            return super().question(layout, number, record)
        gold = {name: record[name] for name in ("name", "key", "annotations")}
        return Question(str(number), TEMPLATE.format(record["key"]), [record.image("image")], gold)

    def said(self, reply: str, gold: Gold, flavour: str) -> Mapping[str, Any]:
        """The reply in the form of the authors' files, where `_` stands for a space or a colon."""
        written = flavour == "official" and reply != ABSENT
        return super().said(reply.translate(WRITTEN) if written else reply, gold, flavour)

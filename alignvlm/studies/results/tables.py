"""Tables of a study, once as they are: the page and the Markdown file are made from the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm.studies.results.statistics import Estimate


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of a row names it."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    lead: str = ""
    """What to look at, above the tables."""
    tables: Sequence[Table] = ()
    figures: Sequence[Any] = ()
    """Charts (`alignvlm.report.charts`)."""
    notes: Sequence[str] = field(default_factory=tuple)
    """Sentences below: how the numbers were made."""


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The sections as Markdown, charts left out."""
    parts = [f"# {_escape(title)}"]
    for section in sections:
        if section.tables or section.notes:
            parts += [f"## {_escape(section.title)}", *([_escape(section.lead)] if section.lead else [])]
            parts += [_table(table) for table in section.tables]
            parts += ["\n".join(f"- {_escape(note)}" for note in section.notes)] if section.notes else []
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (table.head, rule, *table.rows))


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|") or " "


def _escape(text: str) -> str:
    """Text in one line that is no markup."""
    return " ".join(text.split()).replace("<", "&lt;")


def shown(value: Estimate | None, digits: int = 1, scale: float = 100.0, sign: bool = False) -> str:
    """`71.4 ± 0.8`, in percent unless `scale` says otherwise; `sign` writes a plus; – where there is nothing."""
    if value is None:
        return "–"
    text = f"{scale * value.mean:{'+' if sign else ''}.{digits}f}"
    return text if value.error is None else f"{text} ± {scale * value.error:.{digits}f}"

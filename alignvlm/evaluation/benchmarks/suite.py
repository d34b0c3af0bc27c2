"""The paper's Table 2 with a row for another model: nine document benchmarks and their plain mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "docvqa", "infovqa", "deepform", "klc", "wtq", "tabfact", "chartqa", "textvqa", "tablevqabench"
)  # fmt: skip
TITLES = ("DocVQA", "InfoVQA", "DeepForm", "KLC", "WTQ", "TabFact", "ChartQA", "TextVQA", "TableVQA", "Avg.")
CONNECTORS = {
    "MLP": (71.46, 37.56, 62.07, 33.36, 28.94, 73.22, 66.48, 53.56, 50.96, 53.06),
    "Perceiver Resampler": (69.08, 34.13, 57.08, 31.75, 27.95, 71.93, 65.16, 51.33, 47.76, 50.68),
    "Ovis": (74.68, 42.11, 58.02, 33.50, 33.13, 76.67, 67.92, 52.60, 53.93, 54.72),
    "ALIGN": (79.63, 44.53, 63.49, 35.25, 38.59, 78.51, 71.88, 57.38, 60.10, 58.81),
}
"""Connectors on Llama-3.2-3B with the same data and recipe (arXiv 2502.01341 v2, Table 2)."""
BASES = {
    "AlignVLM-Llama-3.2-1B": (72.42, 38.16, 60.47, 33.71, 28.66, 71.31, 65.44, 48.81, 50.29, 52.14),
    "AlignVLM-Llama-3.2-3B": (79.63, 44.53, 63.49, 35.25, 38.59, 78.51, 71.88, 57.38, 60.10, 58.81),
    "AlignVLM-Llama-3.1-8B": (81.18, 53.75, 63.25, 35.50, 45.31, 83.04, 75.00, 64.60, 64.33, 62.88),
}
"""The models that the paper trains."""


def paper_average(entries: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The plain mean of the nine scores; None when one is missing, or of a part of its questions."""
    complete = [entries[name]["score"] for name in COLUMNS if name in entries and entries[name].get("limit") is None]
    return sum(complete) / len(COLUMNS) if len(complete) == len(COLUMNS) else None


def paper_table(model: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the published rows and the model's, and how its numbers were made.

    Args:
        model: what the model's row is called.
        entries: `benchmarks` of results.json; benchmarks that it lacks are shown as –.
    """
    average = paper_average(entries)
    scores = [entries[name]["score"] if name in entries else None for name in COLUMNS]
    shown = ["–" if score is None else f"{score:.2f}" for score in (*scores, average)]
    lines = [_row(["Model", *TITLES]), _row(["---", *["---:"] * len(TITLES)])]
    for name, values in (*CONNECTORS.items(), *BASES.items()):
        lines.append(_row([f"{name} (published)", *(f"{value:.2f}" for value in values)]))
    lines.append(_row([f"**{model}**", *shown]))
    made = [_made(title, entries[name]) for name, title in zip(COLUMNS, TITLES, strict=False) if name in entries]
    text = (
        "Avg. is the plain mean of the nine; it needs all of them with all their questions." if average is None else ""
    )
    return "\n".join([*lines, "", *filter(None, [text]), *made]) + "\n"


def _made(title: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    notes = "".join(f"; {note}" for note in entry["notes"])
    return (
        f"- {title}: {entry['headline']} of {entry['items']:,} questions, 95 % interval {low:.2f} to {high:.2f}, "
        f"flavour {entry['flavour']}{notes}"
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

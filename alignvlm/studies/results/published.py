"""The published rows that a study of connectors stands beside (AlignVLM, arXiv 2502.01341 v2, Tables 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping

from alignvlm.evaluation.benchmarks.suite import CONNECTORS, TITLES
from alignvlm.studies.results.tables import Table

LOW_RESOURCE_TITLES = (
    "DocVQA",
    "InfoVQA",
    "ChartQA",
    "TextVQA",
    "Avg.",
    "MMMU",
    "SeedBench",
    "MMVet",
    "POPE",
    "GQA",
    "Avg.",
)
LOW_RESOURCE = {
    "MLP": (42.11, 19.93, 48.44, 51.97, 40.61, 33.33, 58.54, 31.14, 87.35, 57.62, 53.59),
    "Perceiver": (32.18, 18.10, 40.00, 44.31, 33.64, 35.22, 63.70, 26.19, 84.92, 55.86, 53.17),
    "Ovis": (57.73, 26.39, 54.52, 55.60, 48.56, 31.89, 60.97, 30.41, 88.26, 56.23, 53.55),
    "H-Reducer": (34.59, 17.57, 45.64, 47.13, 36.23, 35.00, 61.82, 28.39, 87.48, 58.24, 54.18),
    "HoneyBee": (55.86, 19.36, 55.32, 58.13, 47.16, 32.11, 61.18, 34.31, 89.28, 54.79, 54.33),
    "ALIGN": (71.43, 30.50, 69.72, 65.63, 59.32, 35.33, 63.27, 35.32, 88.85, 61.67, 56.88),
}
"""SigLIP-400M and Llama-3.2-3B on LLaVA-558K and LLaVA-NeXT-779K; HoneyBee is the C-Abstractor."""
NOISE = {"MLP": (53.06, 27.52, 0.3938), "ALIGN": (58.81, 57.14, 0.0036)}
"""Average score without and with Gaussian noise of sigma 3 on the vision features; cosine distance of the outputs."""
VOCABULARY = (58.81, 58.69, 3_400, 128_256)
"""Average score with the whole vocabulary and with the tokens that matter, how many these are, and of how many."""


def connector_tables() -> list[Table]:
    """Tables 2 and 3 as they were published."""
    return [
        _table(("Published, Llama-3.2-3B", *TITLES), CONNECTORS),
        _table(("Published, low resource", *LOW_RESOURCE_TITLES), LOW_RESOURCE),
    ]


def _table(head: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> Table:
    return Table(head, [(name, *(f"{value:.2f}" for value in values)) for name, values in rows.items()])

"""Records of a study without any training, for its tables and its page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from alignvlm.studies.results.records import NUMBERS, Record, Results
from alignvlm.studies.study import Study
from tests.jobs import TINY


def made_up_results(study: Study, num_seeds: int = 2, missing: tuple[str, ...] = (), **analysis: Any) -> Results:
    """All cells but the missing ones; scores, numbers and losses differ from cell to cell."""
    grid = study.grid(str(TINY), (), num_seeds)
    records = []
    for position, cell in enumerate(grid.cells):
        if cell.name in missing:
            continue
        steps = [
            {"stage": stage, "step": step, "loss": 4.0 / step + position / 10, "connector_entropy": 5.0 - step / 10}
            for stage, count in (("connector", 8), ("instruct", 4))
            for step in range(1, count + 1)
        ]
        scores = {"test": 0.5 + position / 100}
        numbers = dict.fromkeys(NUMBERS, 10.0 + position)
        record = Record(cell, scores, {"test": "Exact match"}, numbers, steps)
        records.append(replace(record, analysis={key: value(cell) for key, value in analysis.items()}))
    return Results(grid, records)

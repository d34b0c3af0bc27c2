"""Examples for the page: samples of the evaluation beside an export, whose images its gallery keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.evaluation.evaluate import read_results
from alignvlm.evaluation.items import spread
from alignvlm.report.run_data import PREDICTION
from alignvlm.run_folder import EvaluationFolder, evaluation_folder, run_of_export
from data_pipeline.files import read_json_lines

MAX_EXAMPLES = 12
"""Most examples of all tasks together."""


@dataclass(frozen=True)
class Example:
    """A question about images, with its accepted answers."""

    task: str
    question: str
    answers: list[str]
    images: list[Path]


def find_examples(export: Path) -> list[Example]:
    """Samples of every task of the evaluation beside an export, tasks taking turns; [] where there is none.

    The folder may come from somebody else: images outside of its run are left out.
    """
    folder, run = EvaluationFolder(evaluation_folder(export)), run_of_export(export)
    tasks = [list(_of_task(folder, task)) for task in read_results(folder).get("tasks", {})]
    share = -(-MAX_EXAMPLES // max(1, len(tasks)))
    chosen = [[rows[i] for i in spread(len(rows), share)] for rows in tasks]
    in_turns = [rows[i] for i in range(share) for rows in chosen if i < len(rows)]
    return [example for example in in_turns if all(map(run.has_file, example.images))][:MAX_EXAMPLES]


def _of_task(folder: EvaluationFolder, task: str) -> Iterator[Example]:
    rows: list[dict[str, Any]] = read_json_lines(folder.predictions(task), PREDICTION)
    for row in rows:
        if row["turn"] == 0 and row.get("images"):
            yield Example(task, row["question"], row["answers"], [folder.path / name for name in row["images"]])

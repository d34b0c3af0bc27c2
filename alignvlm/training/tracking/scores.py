"""The scores of a stage as a tracker shows them: a flat name and a number each, from the result files on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignvlm.run_folder import EvaluationFolder, StageFolder
from alignvlm.training.tracking.entries import number
from data_pipeline.files import read_json


def scores_of(folder: StageFolder) -> Iterator[tuple[Path, dict[str, float]]]:
    """(file, scores by name) of every file of results that holds any."""
    for results, scores in (
        (folder.evaluation.results, _task_scores(folder)),
        (folder.benchmarks.results, _benchmark_scores(folder)),
        (folder.evaluation.text, _text_scores(folder)),
    ):
        if scores:
            yield results, scores


def mark(file: Path) -> str:
    """What a file is called among those that were sent; another one after it was written anew."""
    return f"{file.parent.parent.name}/{file.name} {file.stat().st_mtime_ns}"


def tasks_of(evaluation: EvaluationFolder) -> dict[str, dict[str, Any]]:
    """Scores by task; none when there are no results yet, or when the file is damaged."""
    return read_json(evaluation.results, {"tasks": {str: dict}}).get("tasks", {})


def _task_scores(folder: StageFolder) -> dict[str, float]:
    """Every number of the tasks' results, as `eval/<task>/<name>`."""
    return {
        f"eval/{task}/{key}": score
        for task, scores in tasks_of(folder.evaluation).items()
        for key, value in scores.items()
        if (score := number(value)) is not None
    }


def _text_scores(folder: StageFolder) -> dict[str, float]:
    """Every number of the held-out texts, as `text/<text>/<name>`."""
    texts = read_json(folder.evaluation.text, {"texts": {str: dict}}).get("texts", {})
    return {
        f"text/{name}/{key}": score
        for name, entry in texts.items()
        for key, value in entry.items()
        if (score := number(value)) is not None
    }


def _benchmark_scores(folder: StageFolder) -> dict[str, float]:
    """Every score of the benchmarks in percent, as `benchmark/<benchmark>/<name>`, and the paper's average."""
    results = read_json(folder.benchmarks.results, {"benchmarks": {str: {"scores": {str: float}}}})
    scores = {
        f"benchmark/{name}/{key}": float(value)
        for name, entry in results.get("benchmarks", {}).items()
        for key, value in entry["scores"].items()
    }
    average = number(results.get("paper_average"))
    return scores if average is None else scores | {"benchmark/paper_average": average}

"""Scores of a run as the report shows them: results.json, the table of all stages, marks of single answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignvlm.evaluation.benchmarks.suite import COLUMNS, paper_table
from alignvlm.evaluation.scores import baseline_of, metrics_of
from alignvlm.report.run_data import RunData, StageData
from alignvlm.run_folder import INITIAL


@dataclass(frozen=True)
class Row:
    """One task after one stage."""

    stage: str
    scores: list[tuple[float, float | None] | None]
    """(score, baseline) by every column of the table; None where the task does not have the metric."""
    entry: dict[str, Any]
    """Its entry of the evaluation's results.json."""


@dataclass(frozen=True)
class TaskTable:
    """One task, stage by stage."""

    task: str
    title: str
    """Title of the task's first metric, which stands for the task."""
    rows: list[Row]
    headline: list[tuple[str, float]]
    """("before training" or "after <stage>", score by the first metric), newest stage first."""
    baseline: float


def results_of(run: RunData) -> dict[str, Any]:
    """{"run", "finished", "stages": {stage: {task: {<metric>: score, …, items, baseline, baseline_answer}}}}.

    With held-out texts also {"texts": {stage: {text: {"perplexity", …}}}}, and with benchmarks
    {"benchmarks": {stage: {benchmark: {score: percent}}}}. "goodput" is `Goodput.to_json`.
    """
    stages = {
        stage.name: {task: _summary(entry) for task, entry in stage.results.items()}
        for stage in run.stages
        if stage.results
    }
    benchmarks = {
        stage.name: {name: entry["scores"] for name, entry in stage.benchmarks.items()}
        for stage in run.stages
        if stage.benchmarks
    }
    found = {"benchmarks": benchmarks} if benchmarks else {}
    texts = {stage.name: stage.texts for stage in run.stages if stage.texts}
    found |= {"texts": texts} if texts else {}
    found |= {"goodput": run.goodput.to_json()} if run.goodput else {}
    return {"run": run.name, "finished": run.finished, "stages": stages, **found}


def metric_columns(run: RunData) -> dict[str, dict[str, str]]:
    """Metric name -> its title and note, for every metric of any task."""
    columns: dict[str, dict[str, str]] = {}
    for stage in run.stages:
        for task in run.tasks:
            columns |= metrics_of(stage.results[task]) if task in stage.results else {}
    return columns


def task_tables(run: RunData) -> list[TaskTable]:
    """One table per task, its stages in order."""
    columns = metric_columns(run)
    tables = []
    for task in run.tasks:
        evaluated = [stage for stage in run.stages if task in stage.results]
        rows = [Row(s.name, [_cell(s.results[task], name) for name in columns], s.results[task]) for s in evaluated]
        newest = metrics_of(rows[-1].entry)
        first = next(iter(newest))
        headline = [(_when(row.stage), row.entry[first]) for row in reversed(rows) if first in row.entry]
        tables.append(TaskTable(task, newest[first]["title"], rows, headline, rows[-1].entry["baseline"]))
    return tables


def answer_mark(stage: StageData, task: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """("right", "close" or "wrong", why): right by the task's first metric, close by another one that gives it 1."""
    metrics = metrics_of(stage.results[task]) if task in stage.results else {}
    satisfied = [name for name in metrics if row.get(name) == 1.0]
    if not satisfied:
        return "wrong", "wrong"
    mark = "right" if satisfied[0] == next(iter(metrics)) else "close"
    return mark, metrics[satisfied[0]]["title"]


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in (*metrics_of(entry), "items", "baseline", "baseline_answer")}


def _cell(entry: dict[str, Any], name: str) -> tuple[float, float | None] | None:
    return (entry[name], baseline_of(entry, name)) if name in metrics_of(entry) else None


def _when(stage: str) -> str:
    return "before training" if stage == INITIAL else f"after {stage}"


@dataclass(frozen=True)
class BenchmarkRow:
    """One benchmark after every stage."""

    title: str
    note: str
    """Which score of which flavour, of how many questions."""
    scores: list[float | None]
    """One score in percent per stage that has benchmarks; None where it was not run or not judged."""


def benchmark_rows(run: RunData) -> list[BenchmarkRow]:
    """One row per benchmark, in the order in which they were run."""
    stages = benchmark_stages(run)
    rows = []
    for name in dict.fromkeys(name for stage in stages for name in stage.benchmarks):
        newest = next(stage.benchmarks[name] for stage in reversed(stages) if name in stage.benchmarks)
        scores = [stage.benchmarks.get(name, {}).get("score") for stage in stages]
        note = f"{newest['headline']}, {newest['flavour']}, {newest['items']:,} questions"
        rows.append(BenchmarkRow(str(newest.get("title", name)), note, scores))
    return rows


def benchmark_stages(run: RunData) -> list[StageData]:
    """Stages that have benchmark results, in order."""
    return [stage for stage in run.stages if stage.benchmarks]


def text_stages(run: RunData) -> list[StageData]:
    """Stages whose language model was measured on held-out text, in order."""
    return [stage for stage in run.stages if stage.texts]


def text_rows(run: RunData) -> list[tuple[str, list[float | None]]]:
    """(text, its perplexity after every stage of `text_stages`)."""
    stages = text_stages(run)
    names = dict.fromkeys(name for stage in stages for name in stage.texts)
    return [(name, [stage.texts.get(name, {}).get("perplexity") for stage in stages]) for name in names]


def paper_rows(run: RunData) -> list[list[str]]:
    """Cells of the paper's table with this run's newest row, head first; [] without one of its benchmarks."""
    stages = [stage for stage in benchmark_stages(run) if set(stage.benchmarks) & set(COLUMNS)]
    if not stages:
        return []
    table = paper_table(f"{run.name}, {stages[-1].name}", stages[-1].benchmarks)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip("*") for cell in row] for row in rows if not row[0].startswith("---")]

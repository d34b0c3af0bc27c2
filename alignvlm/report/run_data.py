"""Reads a run folder for the report: facts, steps, results, predictions, skipped samples; what exists so far."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.run import read_results as read_benchmarks
from alignvlm.evaluation.evaluate import read_results
from alignvlm.evaluation.perplexity import read_texts
from alignvlm.report.goodput import Goodput, goodput_of
from alignvlm.run_folder import ATTEMPTS_LINE, ENVIRONMENT, METRICS_LINE, RunFolder, StageFolder
from data_pipeline.files import read_json, read_json_lines, read_needed
from data_pipeline.loading.ledger import LINE as QUARANTINE_LINE

PREDICTION = {
    "index": int, "turn": int, "key": str, "question": str, "answers": [str], "prediction": str, "images?": [str],
}  # fmt: skip


@dataclass(frozen=True)
class StageData:
    """One stage folder."""

    run: RunFolder
    folder: StageFolder
    exported: bool
    results: dict[str, dict[str, Any]]
    """Task -> its entry of evaluation/results.json; {} before the evaluation."""
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Benchmark -> its entry of benchmarks/results.json; {} before they are run."""

    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Held-out text -> its entry of evaluation/text.json; {} before it is measured."""

    @property
    def name(self) -> str:
        """`init` for the model before any training."""
        return self.folder.name

    def predictions(self, task: str) -> list[dict[str, Any]]:
        return _lines(self.run, self.folder.evaluation.predictions(task), PREDICTION)


@dataclass(frozen=True)
class RunData:
    """Everything the report shows that is not a picture."""

    folder: RunFolder
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: list[StageData]
    """The stage folders in order, `init` first."""
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl in order of stage and step, each step once."""
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Starts of stages ({"stage", "resumed_at", "world_size"}), when the run notes them."""
    goodput: Goodput | None = None
    """Where its wall clock went; None when nothing says when it trained."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.path.name)

    @property
    def planned_stages(self) -> list[str]:
        """Stage names of the recipe."""
        return list(self.section("stages"))

    def section(self, *keys: str) -> dict[str, Any]:
        """A section of the recipe; {} when it is missing or no section."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def finished(self) -> bool:
        """Every stage of the recipe has its export."""
        exported = {stage.name for stage in self.stages if stage.exported}
        return bool(self.planned_stages) and exported.issuperset(self.planned_stages)

    @property
    def tasks(self) -> list[str]:
        """Tasks with results, in the order of the recipe; tasks that it no longer has come last."""
        planned = list(self.section("evaluation", "tasks"))
        seen = [task for stage in self.stages for task in stage.results]
        return [t for t in dict.fromkeys(planned + seen) if t in seen]


def read_run(folder: str | Path) -> RunData:
    """Read a run folder, finished or not. The folder may come from somebody else: nothing outside it is read.

    Raises:
        UserError: there is no such folder, nothing of a run in it, or its recipe is damaged. DataError: the folder
            cannot be read.
    """
    run = RunFolder(folder)
    run.must_exist()
    found = read_needed(run.path, lambda _: run.stages(), "make the folder readable")
    stages = [_stage(run, stage) for stage in found if run.holds(stage.path)]
    if not stages and not run.config.is_file():
        raise UserError(f"{run.path} is not a run folder (no {run.config.name} and no stage folders such as 0-init)")
    metrics = _lines(run, run.metrics, METRICS_LINE)
    return RunData(
        folder=run,
        config=run.read_config() if run.has_file(run.config) else {},
        environment=read_json(run.environment, ENVIRONMENT) if run.has_file(run.environment) else {},
        stages=stages,
        steps=_in_order(metrics, {stage.name: stage.folder.number for stage in stages}),
        quarantine=_lines(run, run.quarantine, QUARANTINE_LINE),
        attempts=_lines(run, run.attempts, ATTEMPTS_LINE),
        goodput=goodput_of(run, metrics),
    )


def quarantine_summary(quarantine: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """(source, error with its numbers replaced by #, count, one key), the most frequent first."""
    kinds: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for line in quarantine:
        kind = (str(line.get("source", "")), re.sub(r"\d+", "#", str(line.get("error", ""))))
        kinds[kind] += 1
        example.setdefault(kind, str(line.get("key", "")))
    return [(source, error, count, example[source, error]) for (source, error), count in kinds.most_common()]


def _stage(run: RunFolder, folder: StageFolder) -> StageData:
    results = read_results(folder.evaluation) if run.has_file(folder.evaluation.results) else {}
    benchmarks = read_benchmarks(folder.benchmarks) if run.has_file(folder.benchmarks.results) else {}
    texts = read_texts(folder.evaluation) if run.has_file(folder.evaluation.text) else {}
    exported = (folder.export / "config.json").is_file()
    return StageData(
        run, folder, exported, results.get("tasks", {}), benchmarks.get("benchmarks", {}), texts.get("texts", {})
    )


def _in_order(metrics: list[dict[str, Any]], stage_order: dict[str, int]) -> list[dict[str, Any]]:
    """Steps in order; a resumed run repeats those after its checkpoint, and the last line of a step counts."""
    steps = {(line["stage"], line["step"]): line for line in metrics}
    order = {name: number for number, name in enumerate(dict.fromkeys(stage for stage, _ in steps))}
    return sorted(
        steps.values(),
        key=lambda line: (stage_order.get(line["stage"], 10**6 + order[line["stage"]]), line["step"]),
    )


def _lines(run: RunFolder, path: Path, shape: Any) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file of the run; [] while it does not exist."""
    return read_json_lines(path, shape) if run.has_file(path) else []

"""What the runs of a study say: one record per trained cell, read from its folder, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm.evaluation.scores import metrics_of
from alignvlm.exports import WEIGHTS, WEIGHTS_INDEX, read_tensor_places
from alignvlm.parts import part_of
from alignvlm.report.run_data import RunData, read_run
from alignvlm.studies.cells.grid import Cell, Grid
from alignvlm.studies.results.statistics import Estimate, estimate, paired_difference
from data_pipeline.files import read_json, read_needed

TAIL = 0.1
"""Share of the last stage's steps whose mean loss counts as its end."""


@dataclass(frozen=True)
class Record:
    """A trained cell."""

    cell: Cell
    scores: dict[str, float]
    """Task or benchmark -> its score after the last stage, from 0 to 1."""
    titles: dict[str, str]
    """Task or benchmark -> title of the metric."""
    numbers: dict[str, float]
    """Parameters, tokens, seconds and the like, by the names in `NUMBERS`."""
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    analysis: dict[str, Any] = field(default_factory=dict)
    """What the study measured besides."""
    device: str | None = None
    """Name of the GPU or processor that trained it; None in runs of older versions."""

    def has(self, tasks: Iterable[str]) -> bool:
        """Whether there is a score of each of these tasks: there is none where an evaluation has crashed."""
        return self.scores.keys() >= set(tasks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the steps."""
        known = {"run": self.cell.name, "seed": self.cell.seed, "device": self.device, "scores": self.scores}
        known |= self.numbers
        return known | ({"analysis": self.analysis} if self.analysis else {})


NUMBERS = {
    "connector_parameters": "parameters of the connector",
    "parameters": "parameters of the whole model",
    "tokens_per_tile": "visual tokens that the connector makes of one tile",
    "visual_tokens_per_sample": "mean number of visual tokens of a training sample",
    "samples": "training samples, repeated ones included",
    "tokens": "tokens that entered the language model in training",
    "steps": "optimizer steps",
    "training_seconds": "wall time of the steps, waiting for data included, evaluation and checkpoints left out",
    "evaluation_seconds": "wall time of the last evaluation",
    "final_loss": "mean training loss over the last tenth of the last stage's steps",
}


@dataclass(frozen=True)
class Results:
    """All records of a grid."""

    grid: Grid
    records: list[Record]

    @property
    def tasks(self) -> list[str]:
        """Names of all scores, in the order of the recipe."""
        return list(dict.fromkeys(task for record in self.records for task in record.scores))

    @property
    def is_complete(self) -> bool:
        """Whether every cell is trained and has every score."""
        return len(self.records) == len(self.grid.cells) and all(record.has(self.tasks) for record in self.records)

    def of(self, variant: str) -> list[Record]:
        """The records of a variant, one per seed that is trained."""
        return [record for record in self.records if record.cell.variant.name == variant]

    def values(self, variant: str, value: Callable[[Record], float | None]) -> dict[int, float]:
        """Seed -> a number of a variant's records, those without it left out."""
        found = {record.cell.seed: value(record) for record in self.of(variant)}
        return {seed: number for seed, number in found.items() if number is not None and math.isfinite(number)}

    def mean(self, variant: str, value: Callable[[Record], float | None]) -> Estimate | None:
        """The mean over seeds; None where no cell has the number."""
        values = self.values(variant, value)
        return estimate(list(values.values())) if values else None

    def difference(self, variant: str, value: Callable[[Record], float | None]) -> Estimate | None:
        """The paired difference to the reference over the seeds that both have; None for the reference itself."""
        if variant == self.grid.reference.name:
            return None
        return paired_difference(self.values(variant, value), self.values(self.grid.reference.name, value))

    def summary(self) -> dict[str, Any]:
        """Variant -> its settings, records, means and differences, as JSON."""
        return {
            variant.name: {
                "overrides": list(variant.overrides),
                "note": variant.note,
                "cells": [record.to_dict() for record in self.of(variant.name)],
                "scores": {task: self._entry(variant.name, score_of(task)) for task in self.tasks},
                "average": self._entry(variant.name, average_of(self.tasks)),
                "numbers": {name: _plain(self.mean(variant.name, number_of(name))) for name in NUMBERS},
            }
            for variant in self.grid.variants
        }

    def _entry(self, variant: str, value: Callable[[Record], float | None]) -> dict[str, Any]:
        return {"mean": _plain(self.mean(variant, value)), "difference": _plain(self.difference(variant, value))}


def score_of(task: str) -> Callable[[Record], float | None]:
    """A record's score of a task."""
    return lambda record: record.scores.get(task)


def number_of(name: str) -> Callable[[Record], float | None]:
    """One of the NUMBERS of a record."""
    return lambda record: record.numbers.get(name)


def average_of(tasks: Sequence[str]) -> Callable[[Record], float | None]:
    """The plain mean of a record's scores of these tasks; None where one is missing: other means would not compare."""
    return lambda r: math.fsum(r.scores[task] for task in tasks) / len(tasks) if r.scores and r.has(tasks) else None


def read_results(grid: Grid, analyses: Mapping[str, dict[str, Any]] | None = None) -> Results:
    """The records of all trained cells; `analyses` has what the study measured, by the cell's name."""
    trained = [cell for cell in grid.cells if cell.is_trained]
    return Results(grid, [read_record(cell, (analyses or {}).get(cell.name, {})) for cell in trained])


def read_record(cell: Cell, analysis: dict[str, Any]) -> Record:
    """What a trained cell's folder says. Raises DataError when its export is damaged."""
    run = read_run(cell.run.folder.path)
    last = next(stage for stage in run.stages if stage.name == cell.last_stage.name)
    scores, titles = {}, {}
    for task, entry in last.results.items():
        metric, shown = next(iter(metrics_of(entry).items()))
        scores[task], titles[task] = float(entry[metric]), shown["title"]
    for name, entry in last.benchmarks.items():
        if entry.get("score") is not None:
            scores[name], titles[name] = float(entry["score"]) / 100, str(entry["headline"])
    seconds = sum(entry.get("seconds", 0.0) for entry in last.results.values())
    device = run.environment.get("device")
    return Record(cell, scores, titles, _numbers(cell, run, seconds), run.steps, analysis, device)


def _numbers(cell: Cell, run: RunData, evaluation_seconds: float) -> dict[str, float]:
    steps, per_tile = run.steps, tokens_per_tile(cell)
    total = lambda key: math.fsum(step.get(key) or 0 for step in steps)
    samples = total("samples")
    last = [step["loss"] for step in steps if step["stage"] == cell.last_stage.name and _is_number(step.get("loss"))]
    tail = last[-max(1, round(TAIL * len(last))) :]
    return {
        **count_parameters(cell),
        "tokens_per_tile": per_tile,
        "visual_tokens_per_sample": total("tiles") * per_tile / max(samples, 1),
        "samples": samples,
        "tokens": total("tokens"),
        "steps": len(steps),
        "training_seconds": total("seconds"),
        "evaluation_seconds": evaluation_seconds,
        **({"final_loss": math.fsum(tail) / len(tail)} if tail else {}),
    }


def tokens_per_tile(cell: Cell) -> int:
    """T', from the processor of the cell's export."""
    config = read_json(cell.last_stage.export / "processor_config.json")
    tiling = config.get("image_processor") or config.get("tiling") or {}  # the second in older exports
    return int(tiling.get("tokens_per_tile") or 0)


def count_parameters(cell: Cell) -> dict[str, float]:
    """Elements of the export's tensors, from the headers of its files. Raises DataError when one is damaged."""
    export = cell.last_stage.export
    index = read_json(export / WEIGHTS_INDEX).get("weight_map")
    names: Sequence[str] = sorted(set(index.values())) if index else [WEIGHTS]
    sizes: dict[str, int] = {}
    for name in names:
        _, tensors = read_needed(export / name, read_tensor_places, "remove the export and start the study again")
        sizes |= {tensor: math.prod(place["shape"]) for tensor, place in tensors.items()}
    connector = sum(size for name, size in sizes.items() if part_of(name) == "connector")
    return {"connector_parameters": connector, "parameters": sum(sizes.values())}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()

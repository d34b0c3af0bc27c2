"""The report of a run: one self-contained HTML page and results.json, from the files that the run has so far."""

from __future__ import annotations

import base64
import io
import logging
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignvlm.best import find_best, stage_scores
from alignvlm.config.names import HELD_OUT, LOSS
from alignvlm.config.schema import RecomputeConfig
from alignvlm.report.bars import rank_times, time_of
from alignvlm.report.charts import Chart, Series, Value, draw, finite, format_duration, format_number
from alignvlm.report.overlay import draw_view
from alignvlm.report.page import render_template
from alignvlm.report.results import (
    answer_mark,
    benchmark_rows,
    benchmark_stages,
    metric_columns,
    paper_rows,
    results_of,
    task_tables,
    text_rows,
    text_stages,
)
from alignvlm.report.run_data import RunData, StageData, quarantine_summary, read_run
from alignvlm.run_folder import RECOMPUTATION, VIEW_SUFFIX, RunFolder
from data_pipeline.files import must_write, read_json, reason, to_json, write_atomic
from data_pipeline.samples.images import decode_image, image_bytes, image_extension, image_size
from data_pipeline.samples.schema import SampleError

VIEWS = 4
"""Images with vocabulary tokens drawn over them."""
MAX_PNG_BYTES = 40_000
"""Larger pictures are embedded as JPEG."""
PARTS = ("vision", "connector", "language")
CELL = {"top": [list], "entropy": float}
VIEW = {"entropy": float, "vocabulary": int, "tiles": [{"box": [float], "side": int, "cells": [CELL]}]}
"""What the evaluation writes about the vocabulary tokens of an image."""

log = logging.getLogger(__name__)


def build_report(run_folder: str | Path) -> Path:
    """Write `<run>/report/index.html` and `<run>/report/results.json` of a run, finished or not.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder holds no run. DataError: the report cannot be written.
    """
    run = read_run(run_folder)
    results, page = to_json(results_of(run), indent=2, ensure_ascii=False) + "\n", render(run)
    with must_write(run.folder.report, "make the run folder writable, or copy it to where you may write"):
        run.folder.report.mkdir(exist_ok=True)
        if not run.folder.holds(run.folder.report):
            raise OSError("it leads out of the run folder")
        write_atomic(run.folder.report_results, results)
        write_atomic(run.folder.report_page, page)
    return run.folder.report_page


def render(run: RunData) -> str:
    """The page as text."""
    return render_template(
        "report.html",
        run=run,
        facts=_facts(run),
        results=task_tables(run),
        metrics=metric_columns(run),
        benchmarks=benchmark_rows(run),
        benchmark_stages=benchmark_stages(run),
        paper=paper_rows(run),
        texts=text_rows(run),
        text_stages=text_stages(run),
        charts=[figure for chart in _charts(run) if (figure := draw(chart, run.steps)) is not None],
        time=time_of(run),
        gallery=[(task, _gallery(run, task)) for task in run.tasks],
        views=_views(run),
        quarantine=quarantine_summary(run.quarantine),
        config=_config_text(run),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The facts in the head of the page, as far as they are known."""
    facts: list[tuple[str, str]] = []
    environment = run.environment
    planned = run.section("train").get("processes")
    world_size = run.attempts[-1].get("world_size", planned) if run.attempts else planned
    if run.steps:
        facts.append(("Steps", f"{len(run.steps):,}"))
        facts.append(("Tokens", format_number(_total(run, "tokens"))))
        facts.append(("Samples", format_number(_total(run, "samples"))))
        facts.append(("Training time", format_duration(_total(run, "seconds"))))
        facts.append(("Checkpoint wait", f"{_total(run, 'checkpoint_stall'):.1f} s"))
    if world_size:
        facts.append(("Processes", str(world_size)))
    if run.attempts:
        facts.append(("Resumes", str(sum(attempt["resumed_at"] > 0 for attempt in run.attempts))))
        ended = (
            f"{attempt['stage']}, {attempt['ended_early']}" for attempt in run.attempts if attempt.get("ended_early")
        )
        facts += [("Early end", text) for text in dict.fromkeys(ended)]
    best = _best(run)
    if best is not None:
        facts.append(("Best checkpoint", best))
    if environment.get("device"):
        facts.append(("Device", environment["device"]))
    if environment.get("git_commit"):
        facts.append(("Commit", str(environment["git_commit"])[:10]))
    recomputed = [
        f"{stage.name}: {RecomputeConfig(found['vision'], found['language']).words}"
        for stage in run.stages
        if run.folder.has_file(stage.folder.recomputation)
        and (found := read_json(stage.folder.recomputation, RECOMPUTATION))
    ]
    if recomputed:
        facts.append(("Recomputed layers", "; ".join(recomputed)))
    packages = environment.get("packages") or {}
    facts += [(name, packages[name]) for name in ("torch", "deepspeed", "transformers") if name in packages]
    if environment.get("started"):
        facts.append(("Started", str(environment["started"])[:16].replace("T", " ")))
    return facts


def _best(run: RunData) -> str | None:
    """Stage, step and score of the checkpoint that `alignvlm export --best` takes."""
    name = run.section("checkpoint").get("keep_best")
    scored = [each for stage in run.stages for each in stage_scores(stage.folder, run.folder.has_file)]
    best = find_best(scored, name) if isinstance(name, str) else None
    if best is None:
        return None
    stage = best.folder.parents[1].name.partition("-")[2]
    return f"{stage}, step {best.step:,}: {name} {best.score:.4g}"


def _total(run: RunData, key: str) -> float:
    return sum(value for step in run.steps if (value := finite(step.get(key))) is not None)


def _rates(step: dict[str, Any]) -> dict[str, Any]:
    """Learning rates by part of the model."""
    rates = step.get("lr")
    return rates if isinstance(rates, dict) else {}


def _charts(run: RunData) -> list[Chart]:
    def one(name: str, colour: int, key: str) -> list[Series]:
        return [Series(name, colour, lambda step: step.get(key))]

    def rate(part: str) -> Value:
        return lambda step: _rates(step).get(part)

    parts = dict.fromkeys(part for step in run.steps for part in _rates(step))
    order = [part for part in PARTS if part in parts] + [part for part in parts if part not in PARTS]
    held_out = Series("held-out loss", 1, lambda step: step.get(HELD_OUT), exact=True)
    return [
        Chart("Loss", [*one("loss", 0, "loss"), held_out], "per supervised token", log=True, smooth=True),
        *_loss_by_source(run),
        Chart("Learning rate", [Series(part, i % 5, rate(part)) for i, part in enumerate(order)], zero=True),
        Chart("Gradient norm", one("norm", 1, "grad_norm"), "before clipping", log=True, smooth=True),
        Chart("Throughput", one("tokens/s", 2, "tokens_per_second"), "tokens per second", smooth=True, zero=True),
        Chart("Packing fill", one("fill", 3, "fill"), "fraction of each pack that is not padding"),
        Chart("Connector entropy", one("entropy", 4, "connector_entropy"), "nats per visual token"),
        Chart(
            "Connector top probability",
            one("probability", 0, "connector_top_mass"),
            "mean over visual tokens",
            zero=True,
        ),
        Chart("Data wait", one("seconds", 1, "data_wait"), "seconds per step", zero=True),
        _times_of_ranks(),
    ]


def _times_of_ranks() -> Chart:
    """Mean and largest compute of a rank, and the largest waits: how uneven the ranks are."""

    def value(kind: str, which: str) -> Value:
        return lambda step: rank_times(step).get(kind, {}).get(which)

    lines = [("compute, slowest", "compute", "max"), ("compute, mean", "compute", "mean"),
             ("waiting for others", "wait", "max"), ("waiting for data", "data", "max")]  # fmt: skip
    series = [Series(name, i, value(kind, which)) for i, (name, kind, which) in enumerate(lines)]
    return Chart("Times of the ranks", series, "seconds per step", zero=True)


def _loss_by_source(run: RunData) -> list[Chart]:
    """The training and the held-out loss of every source; no chart where there is only one."""

    def trained(name: str) -> Value:
        return lambda step: _losses(step).get(name)

    def measured(name: str) -> Value:
        return lambda step: step.get(f"{LOSS}{name}")

    names = list(dict.fromkeys(name for step in run.steps for name in _losses(step)))
    keys = dict.fromkeys(key for step in run.steps for key in step if key.startswith(LOSS) and key != HELD_OUT)
    held_out = [key.removeprefix(LOSS) for key in keys]
    training = [Series(name, i % 5, trained(name)) for i, name in enumerate(names)]
    validation = [Series(name, i % 5, measured(name), exact=True) for i, name in enumerate(held_out)]
    charts = [Chart("Training loss by source", training, "per supervised token", log=True, smooth=True)]
    charts += [Chart("Held-out loss by source", validation, "per supervised token", log=True)]
    return [chart for chart in charts if len(chart.series) > 1]


def _losses(step: dict[str, Any]) -> dict[str, Any]:
    """Training losses by source."""
    losses = step.get("source_loss")
    return losses if isinstance(losses, dict) else {}


def _gallery(run: RunData, task: str) -> list[dict[str, Any]]:
    """Samples with images, each with its questions and the answers of every stage."""
    samples: dict[int, dict[str, Any]] = {}
    for stage in run.stages:
        for row in stage.predictions(task):
            if "images" not in row:
                continue
            sample = samples.setdefault(row["index"], {"key": row["key"], "turns": {}})
            sample["pictures"] = [stage.folder.evaluation.path / name for name in row["images"]]
            turn = sample["turns"].setdefault(row["turn"], {"question": row["question"], "answers": row["answers"]})
            turn.setdefault("predictions", []).append((stage.name, row["prediction"], *answer_mark(stage, task, row)))
    for sample in samples.values():
        uris = [embed(run.folder, path) for path in sample.pop("pictures")]
        sample["images"] = [uri for uri in uris if uri is not None]
        sample["turns"] = [sample["turns"][turn] for turn in sorted(sample["turns"])]
    return [samples[index] for index in sorted(samples)]


def _views(run: RunData) -> list[dict[str, Any]]:
    """Vocabulary views of the newest evaluated stage, tasks taking turns, with their mean entropy in every stage."""
    evaluated: list[StageData] = [stage for stage in run.stages if stage.results]
    if not evaluated:
        return []
    newest = evaluated[-1].folder.evaluation
    per_task = [newest.views(task) for task in run.tasks]
    chosen = [paths[i] for i in range(VIEWS) for paths in per_task if i < len(paths)]
    views = []
    for path in sorted(chosen[:VIEWS]):
        task, index = path.name.removesuffix(VIEW_SUFFIX).rsplit("-", 1)
        views.append(_view(run, evaluated, task, int(index)))
    return [view for view in views if view is not None]


def _view(run: RunData, evaluated: list[StageData], task: str, index: int) -> dict[str, Any] | None:
    """The view of a sample after the last of these stages; None when it or its picture is missing or damaged."""
    found = {}
    for stage in evaluated:
        path = stage.folder.evaluation.view(task, index)
        found[stage.name] = read_json(path, VIEW) if run.folder.has_file(path) else {}
    view = found[evaluated[-1].name]
    picture = evaluated[-1].folder.evaluation.picture(task, index, 0)
    uri = embed(run.folder, picture)
    if not view or uri is None:
        return None
    try:
        drawing = draw_view(view, uri, image_size(image_bytes(picture)))
        uniform = math.log(view["vocabulary"])
    except (SampleError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        log.warning("%s cannot be drawn and is left out (%s)", picture, reason(error))
        return None
    history = [(name, each["entropy"]) for name, each in found.items() if each]
    return {"drawing": drawing, "task": task, "history": history, "uniform": uniform}


def embed(run: RunFolder, path: Path) -> str | None:
    """A picture of the run as a data URI: its own PNG when small, else JPEG; None when it is missing or damaged."""
    if not run.has_file(path):
        return None
    try:
        data = image_bytes(path)
        kind = "jpeg" if (extension := image_extension(data)) == "jpg" else extension
        if len(data) > MAX_PNG_BYTES:
            buffer = io.BytesIO()
            decode_image(data).save(buffer, "JPEG", quality=85, optimize=True)
            if buffer.tell() < len(data):
                data, kind = buffer.getvalue(), "jpeg"
    except SampleError as error:
        log.warning("%s is left out of the report (%s)", path, reason(error))
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _config_text(run: RunData) -> str:
    return run.folder.config.read_text(encoding="utf-8") if run.config else ""

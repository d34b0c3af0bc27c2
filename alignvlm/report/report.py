"""The report of a run: one self-contained HTML page and results.json, from the files that the run has so far."""

from __future__ import annotations

import base64
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignvlm.report.charts import Chart, Series, Value, draw, format_number
from alignvlm.report.overlay import draw_view
from alignvlm.report.results import answer_mark, metric_columns, results_of, task_tables
from alignvlm.report.run_data import RunData, StageData, quarantine_summary, read_run
from alignvlm.resources import resource
from alignvlm.run_folder import VIEW_SUFFIX
from data_pipeline.files import write_atomic
from data_pipeline.samples.images import decode_image, image_size

VIEWS = 4
"""Images with vocabulary tokens drawn over them."""
MAX_PNG_BYTES = 40_000
"""Larger pictures are embedded as JPEG."""
PARTS = ("vision", "connector", "language")


def build_report(run_folder: str | Path) -> Path:
    """Write `<run>/report/index.html` and `<run>/report/results.json` of a run, finished or not.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(run_folder)
    run.folder.report.mkdir(exist_ok=True)
    write_atomic(run.folder.report_results, json.dumps(results_of(run), indent=2, ensure_ascii=False) + "\n")
    write_atomic(run.folder.report_page, render(run))
    return run.folder.report_page


def render(run: RunData) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape
    from markupsafe import Markup

    templates = resource("templates")
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f}"
    environment.filters["number"] = format_number
    environment.filters["in_text"] = _in_text
    return environment.get_template("report.html").render(
        run=run,
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup((templates / "report.js").read_text(encoding="utf-8")),
        facts=_facts(run),
        results=task_tables(run),
        metrics=metric_columns(run),
        charts=[figure for chart in _charts(run) if (figure := draw(chart, run.steps)) is not None],
        gallery=[(task, _gallery(run, task)) for task in run.tasks],
        views=_views(run),
        quarantine=quarantine_summary(run.quarantine),
        config=_config_text(run),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _in_text(title: str) -> str:
    """A title inside a sentence: "exact match", but "ANLS"."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The facts in the head of the page, as far as they are known."""
    facts: list[tuple[str, str]] = []
    environment = run.environment
    planned = (run.config.get("train") or {}).get("processes")
    world_size = run.attempts[-1].get("world_size", planned) if run.attempts else planned
    if run.steps:
        facts.append(("Steps", f"{len(run.steps):,}"))
        facts.append(("Tokens", format_number(sum(step.get("tokens") or 0 for step in run.steps))))
        facts.append(("Samples", format_number(sum(step.get("samples") or 0 for step in run.steps))))
        facts.append(("Training time", format_duration(sum(step.get("seconds") or 0.0 for step in run.steps))))
        facts.append(("Checkpoint wait", f"{sum(step.get('checkpoint_stall') or 0.0 for step in run.steps):.1f} s"))
    if world_size:
        facts.append(("Processes", str(world_size)))
    if run.attempts:
        facts.append(("Resumes", str(sum(attempt.get("resumed_at", 0) > 0 for attempt in run.attempts))))
    if environment.get("git_commit"):
        facts.append(("Commit", str(environment["git_commit"])[:10]))
    packages = environment.get("packages") or {}
    facts += [(name, packages[name]) for name in ("torch", "deepspeed", "transformers") if name in packages]
    if environment.get("started"):
        facts.append(("Started", str(environment["started"])[:16].replace("T", " ")))
    return facts


def _charts(run: RunData) -> list[Chart]:
    def one(name: str, colour: int, key: str) -> list[Series]:
        return [Series(name, colour, lambda step: step.get(key))]

    def rate(part: str) -> Value:
        return lambda step: (step.get("lr") or {}).get(part)

    parts = dict.fromkeys(part for step in run.steps for part in step.get("lr") or {})
    order = [part for part in PARTS if part in parts] + [part for part in parts if part not in PARTS]
    return [
        Chart("Loss", one("loss", 0, "loss"), "per supervised token", log=True, smooth=True),
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
    ]


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
        sample["images"] = [embed(path) for path in sample.pop("pictures") if path.is_file()]
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
        view = _read_json(path)
        task, index = path.name.removesuffix(VIEW_SUFFIX).rsplit("-", 1)
        picture = newest.picture(task, int(index), 0)
        history = [
            (stage.name, _read_json(other)["entropy"])
            for stage in evaluated
            if (other := stage.folder.evaluation.view(task, int(index))).is_file()
        ]
        views.append(
            {
                "drawing": draw_view(view, embed(picture), image_size(picture.read_bytes())),
                "task": task,
                "history": history,
                "uniform": math.log(view["vocabulary"]),
            }
        )
    return views


def embed(path: Path) -> str:
    """A picture as a data URI: its own PNG when small, else JPEG."""
    data, kind = path.read_bytes(), "png"
    if len(data) > MAX_PNG_BYTES:
        buffer = io.BytesIO()
        decode_image(data).save(buffer, "JPEG", quality=85, optimize=True)
        if buffer.tell() < len(data):
            data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def format_duration(seconds: float) -> str:
    """`42 s`, `7 min 05 s`, `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _config_text(run: RunData) -> str:
    return run.folder.config.read_text(encoding="utf-8") if run.folder.config.is_file() else ""


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""The page of a study, its results.json and table.md: common parts of every study, then the study's own sections."""

from __future__ import annotations

import math
import shlex
from datetime import UTC, datetime
from pathlib import Path

from alignvlm.report.page import render_template
from alignvlm.report.report import format_duration
from alignvlm.studies.results.common import Chosen, common_sections
from alignvlm.studies.results.records import NUMBERS, Results
from alignvlm.studies.results.tables import markdown
from alignvlm.studies.study import Study
from alignvlm.system.environment import describe_environment
from data_pipeline.files import must_write, to_json, write_atomic
from data_pipeline.masking import mask

PAGE, RESULTS, TABLE = "index.html", "results.json", "table.md"


def write_page(study: Study, results: Results, batches: Chosen, folder: Path) -> Path:
    """Write the page, results.json and table.md of what is trained so far; returns the path of the page.

    Raises:
        DataError: the folder cannot be written.
    """
    grid = results.grid
    sections = [*common_sections(results, batches), *study.sections(results)]
    content = {
        "study": study.name,
        "recipe": grid.recipe_name,
        "overrides": list(map(mask, grid.overrides)),
        "seeds": grid.seeds,
        "reference": grid.reference.name,
        "finished": results.is_complete,
        "scores": {task: title for record in results.records for task, title in record.titles.items()},
        "numbers": NUMBERS,
        "variants": results.summary(),
        "batches": {cell: {stage: each.to_dict() for stage, each in read.items()} for cell, read in batches.items()},
        "environment": describe_environment(),
    }
    page = render_template(
        "study.html",
        study=study,
        finished=content["finished"],
        facts=_facts(results),
        sections=sections,
        command=_command(results),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with must_write(folder, "make it writable, or give another one: --output FOLDER"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RESULTS, to_json(content, indent=1, ensure_ascii=False) + "\n")
        write_atomic(folder / TABLE, markdown(f"{study.title}: {grid.base.name}", sections))
        write_atomic(folder / PAGE, page)
    return folder / PAGE


def _command(results: Results) -> str:
    grid = results.grid
    words = ["alignvlm", "study", grid.study, grid.recipe_name, "--seeds", str(len(grid.seeds)), *grid.overrides]
    return mask(shlex.join(words))


def _facts(results: Results) -> list[tuple[str, str]]:
    grid = results.grid
    facts = [
        ("Recipe", grid.base.name),
        ("Variants", str(len(grid.variants))),
        ("Seeds", ", ".join(map(str, grid.seeds))),
        ("Trained", f"{len(results.records)} of {len(grid.cells)} runs"),
    ]
    seconds = [record.numbers["training_seconds"] for record in results.records]
    if seconds:
        facts.append(("Training time", format_duration(math.fsum(seconds))))
    return facts

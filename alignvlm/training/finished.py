"""The seal of a finished run: `alignvlm train` sees in a second that there is nothing left to do.

Opening everything again to find the same takes a job of all ranks. The seal says how everything that a start would
check looked at the end; a start that finds any of it different, or no seal, looks for itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignvlm import __version__
from alignvlm.best import find_best, stage_scores
from alignvlm.config import recipe_to_dict
from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.job import jobs_of_recipe
from alignvlm.evaluation.perplexity import text_identity
from alignvlm.metrics import find_metric
from alignvlm.run_folder import Run, StageFolder
from alignvlm.training.tracking.database import sqlite_file
from alignvlm.training.tracking.target import Target
from data_pipeline.checksums import digest
from data_pipeline.errors import DataError
from data_pipeline.files import must_write, read_json, write_atomic
from data_pipeline.shards.sidecars import find_beside
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores.folders import MANIFEST

SEAL = {"recipe": str, "files": dict}


def seal(run: Run) -> None:
    """Remember that this run is finished and delivered. Rank 0 only.

    Raises:
        DataError: the file cannot be written.
    """
    with must_write(run.folder.seal, "make the run's folder writable"):
        write_atomic(run.folder.seal, json.dumps(_look(run), indent=1) + "\n")


def is_finished(run: Run) -> bool:
    """Whether nothing of what a start would check has changed since the run was sealed."""
    found = read_json(run.folder.seal, SEAL)
    try:
        return bool(found) and found == _look(run)
    except (DataError, UserError):  # a source or a benchmark's data cannot be looked at: the start says why
        return False


def _look(run: Run) -> dict[str, Any]:
    """Everything that decides whether there is work left, as JSON would give it back."""
    recipe = run.recipe
    tasks = recipe.evaluation.tasks.values()
    metrics = {name: find_metric(name).version for task in tasks for name in task.metrics}
    evaluated = {task.source: recipe.data.sources[task.source] for task in tasks}
    manifests = {name: find_beside(open_storage(source.folder), MANIFEST) for name, source in evaluated.items()}
    benchmarks = {job.benchmark.name: job.identity(model="") for job in jobs_of_recipe(recipe)}
    texts = {name: digest(text_identity(text)) for name, text in recipe.evaluation.text.items()}
    target = Target.of(run)
    database = sqlite_file(target.uri)
    files = [run.folder.report_page, run.folder.report_results]
    for stage in run.stage_folders():
        files += sorted(stage.export.rglob("*")) if stage.has_export else [stage.export]
        files += [stage.evaluation.results, *map(stage.evaluation.predictions, recipe.evaluation.tasks)]
        files += [stage.evaluation.text] if texts else []
        files += [stage.benchmarks.results, *map(stage.benchmarks.replies, benchmarks)] if benchmarks else []
    files += [path for stage in run.stage_folders() for path in _best(stage, recipe.checkpoint.keep_best)]
    return {
        "alignvlm": __version__,
        "recipe": digest(recipe_to_dict(recipe)),
        "metrics": metrics,
        "held_out": {
            name: digest(path and path.read_text(encoding="utf-8", errors="replace"))
            for name, path in manifests.items()
        },
        "benchmarks": benchmarks,
        "texts": texts,
        "tracking": [target.shown_uri, target.experiment, database is None or database.is_file()],
        "files": {path.relative_to(run.folder.path).as_posix(): _stamp(path) for path in files},
    }


def _best(stage: StageFolder, score: str | None) -> list[Path]:
    """The files of a stage's best checkpoint."""
    best = find_best(stage_scores(stage), score) if score else None
    return sorted(path for path in best.folder.rglob("*") if path.is_file()) if best else []


def _stamp(path: Any) -> list[int] | None:
    """Size in bytes and time of the last change in ns; None where there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns]

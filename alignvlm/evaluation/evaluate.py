"""Evaluates an exported model on the held-out tasks of a recipe: predictions, scores and gallery images on disk.

Runs in one process, or in several that share a file system.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from alignvlm.config.schema import Recipe, SourceConfig
from alignvlm.config.sections.evaluation import EvaluationConfig, TaskConfig
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import Answerer, ModelAnswerer
from alignvlm.evaluation.batches import ahead, prepare_batch
from alignvlm.evaluation.items import Item, items_of, spread
from alignvlm.evaluation.scores import is_entry, score, task_scores
from alignvlm.metrics import Metric, find_metric
from alignvlm.progress import Progress
from alignvlm.run_folder import WAY_OUT, EvaluationFolder
from alignvlm.stage_data import open_reader
from alignvlm.system.ranks import ALONE, Ranks
from data_pipeline.checksums import digest, stamps
from data_pipeline.errors import nearest
from data_pipeline.files import must_write, read_json, read_needed, to_json, write_atomic, write_json_lines
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.sidecars import find_beside
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores import hub
from data_pipeline.stores.folders import MANIFEST

T = TypeVar("T")
log = logging.getLogger(__name__)

EVALUATION_VERSION = 3
"""Raised when prompts, scores or files change, so that older results are computed again."""
VIEWS_PER_TASK = 2
"""Samples per task whose image is saved with the connector's top tokens."""
GALLERY_SIDE = 1280
"""Longest side in pixels of a gallery image."""


def evaluate(
    model_folder: str | Path,
    recipe: Recipe,
    out_folder: str | Path,
    *,
    ranks: Ranks = ALONE,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = False,
    device: Any = None,
    answerer: Answerer | None = None,
) -> dict[str, Any]:
    """Evaluate an export folder on the recipe's tasks; every rank calls this and gets the same results, or errors.

    The ranks take turns with blocks of `evaluation.batch_size` samples, so batches do not depend on their number.
    Written are the predictions in order (`<out>/<task>.jsonl`), the items that cannot be used with the reason
    (`<out>/<task>.unusable.jsonl`), the images of `recipe.evaluation.gallery` samples per task (`<out>/gallery/`) and
    the scores (`<out>/results.json`). A task is skipped when results.json already has it for the same model files,
    shards, metrics and settings.

    Args:
        progress: whether rank 0 shows its progress on each task.
        ranks: those that share the work. What is done already is seen by rank 0 alone: on a network file system hosts
            may see different files for a while.
        tasks: names of tasks (default: all).
        limit: most samples per task; the task's own limit holds as well.
        device: a torch device or its name (default: this process's GPU, else the CPU).
        answerer: used instead of loading `model_folder`, which still identifies the results.

    Returns:
        The content of results.json: {"model", "tasks": {task: scores, "items", "baseline", …}}.

    Raises:
        UserError: an unknown task or metric, or no model in the folder.
    """
    out = EvaluationFolder(Path(out_folder))
    jobs = {name: _Job.of(recipe, task, limit) for name, task in _choose_tasks(recipe, tasks).items()}
    load = functools.cache(lambda: answerer or ModelAnswerer.load(model_folder, device))

    def finish(name: str) -> None:
        with must_write(out.path, WAY_OUT):
            entries[name] = _merge_parts(jobs[name], out, ranks.size) | {"identity": identities[name]}
            results = {"model": str(model_folder), "tasks": {n: entries[n] for n in jobs if n in entries}}
            write_atomic(out.results, to_json(results, indent=2, ensure_ascii=False) + "\n")

    with hub.held() as commits:
        entries, identities = ranks.of_main(_done, jobs, Path(model_folder), out)
        commits.update(ranks.broadcast(commits))  # all ranks read a branch at the commit that rank 0 has looked at
        for name in [name for name in jobs if name not in entries]:
            ranks.together(_answer_part, jobs[name], load, out, ranks, progress)
            ranks.of_main(finish, name)
    return ranks.of_main(read_results, out)


def _done(
    jobs: dict[str, _Job], model_folder: Path, out: EvaluationFolder
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(task -> its entry, where results.json has it already; task -> identity)."""
    identities = {name: job.identity(model_folder) for name, job in jobs.items()}
    known = read_results(out).get("tasks", {})
    entries = {name: known[name] for name in jobs if known.get(name, {}).get("identity") == identities[name]}
    return entries, identities


def read_results(folder: EvaluationFolder) -> dict[str, Any]:
    """Content of results.json; {} before the first task is evaluated, and with a warning when it is damaged."""
    return read_json(folder.results, {"model": str, "tasks": {str: is_entry}})


@dataclass(frozen=True)
class _Job:
    """A task with everything that decides its prompts, answers and scores, the model apart."""

    task: TaskConfig
    source: SourceConfig
    settings: EvaluationConfig
    metrics: list[Metric]
    limit: int | None

    @classmethod
    def of(cls, recipe: Recipe, task: TaskConfig, limit: int | None) -> _Job:
        metrics = [find_metric(name) for name in task.metrics]
        return cls(task, recipe.data.sources[task.source], recipe.evaluation, metrics, limit)

    def identity(self, model_folder: Path) -> str:
        """Changes with the model's files, the shards' manifest, or a setting that the results depend on."""
        task, source = self.task, self.source
        manifest = find_beside(open_storage(source.folder), MANIFEST)
        state = [
            EVALUATION_VERSION,
            stamps(sorted(model_folder.iterdir()) if model_folder.is_dir() else []),
            source.path if manifest is None else manifest.read_text(encoding="utf-8", errors="replace"),
            [source.prompt, task.limit, self.limit, task.max_new_tokens, self.settings.gallery],
            [[metric.name, metric.version] for metric in self.metrics],
        ]
        return digest(state)


def _answer_part(job: _Job, load: Callable[[], Answerer], out: EvaluationFolder, ranks: Ranks, progress: bool) -> None:
    """Answer and score this rank's samples, and write them to its part."""
    answerer, task, reader = load(), job.task, open_reader(job.source)
    num_samples = min(n for n in (len(reader), task.limit, job.limit) if n is not None)
    gallery = spread(num_samples, job.settings.gallery)
    viewed = set(gallery[:VIEWS_PER_TASK])
    size = job.settings.batch_size
    blocks = [range(first, min(first + size, num_samples)) for first in range(0, num_samples, size)]
    mine = blocks[ranks.rank :: ranks.size]
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    part = out.part(task.name, ranks.rank, ranks.size)
    with must_write(part, WAY_OUT):  # asked before the model answers for minutes
        part.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(part, [])

    def items(block: range) -> Iterator[tuple[dict[str, Any], Item]]:
        for index in block:
            try:
                sample = reader[index]
                sample_items = items_of(sample)
            except SampleError as error:
                rows.append({"index": index, "turn": 0, "key": reader.entry(index).key, "error": str(error)})
                continue
            extra = {"images": _save_images(out, task.name, index, sample.images)} if index in gallery else {}
            for item in sample_items:
                row = {"index": index, "turn": item.turn, "key": item.key, "task": task.name, "question": item.question}
                yield row | {"answers": item.answers, "prediction": ""} | extra, item

    with Progress(
        f"evaluate {task.name}", sum(map(len, mine)), enabled=progress and ranks.is_main, beat=ranks.beat
    ) as bar:
        entries = (batch for block in mine for batch in _batches(items(block), size))
        batches = ((batch, prepare_batch(answerer, [item for _, item in batch])) for batch in entries)
        for batch, prepared in ahead(batches):
            predictions = prepared.answers(answerer, task.max_new_tokens)
            bar.advance(len({row["index"] for row, _ in batch if row["turn"] == 0}))
            for (row, item), prediction in zip(batch, predictions, strict=True):
                if row["index"] in viewed and row["turn"] == 0:
                    _save_view(out, task.name, row["index"], answerer.vocabulary_view(item))
                if isinstance(prediction, SampleError):
                    named = {name: row[name] for name in ("index", "turn", "key")}
                    rows.append(named | {"error": str(prediction)})
                else:
                    said = prediction.strip()
                    rows.append(row | {"prediction": said} | score(job.metrics, said, item.answers))
    with must_write(part, WAY_OUT):
        write_json_lines(part, [*rows, {"seconds": time.monotonic() - started}])


def _merge_parts(job: _Job, out: EvaluationFolder, world_size: int) -> dict[str, Any]:
    """Join the parts of all ranks into `<task>.jsonl`; returns the task's entry of results.json."""
    name = job.task.name
    paths = [out.part(name, rank, world_size) for rank in range(world_size)]
    lines = [row for path in paths for row in read_needed(path, _read_part, "evaluate again")]
    rows = sorted((row for row in lines if "index" in row), key=lambda row: (row["index"], row["turn"]))
    predictions = [row for row in rows if "error" not in row]
    write_json_lines(out.predictions(name), predictions)
    unusable = [row for row in rows if "error" in row]
    out.unusable(name).unlink(missing_ok=True)
    if unusable:
        write_json_lines(out.unusable(name), unusable)
        key, error = unusable[0]["key"], unusable[0]["error"]
        log.warning(
            "task %s: %d items could not be used, see %s (first: %s: %s)",
            name, len(unusable), out.unusable(name), key, error,
        )  # fmt: skip
    for path in paths:
        path.unlink()
    return {
        **task_scores(job.metrics, predictions),
        "unreadable": len(unusable),
        "seconds": round(max(row["seconds"] for row in lines if "seconds" in row), 3),
    }


def _read_part(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    if not rows or "seconds" not in rows[-1]:
        raise ValueError("its end is missing")
    return rows


def _choose_tasks(recipe: Recipe, names: Sequence[str] | None) -> dict[str, TaskConfig]:
    tasks = recipe.evaluation.tasks
    for name in names or ():
        if name not in tasks:
            raise UserError(f"recipe {recipe.name!r} has no evaluation task {name!r}: {nearest(name, tasks)}")
    return {name: task for name, task in tasks.items() if not names or name in names}


def _save_images(out: EvaluationFolder, name: str, index: int, images: Sequence[Image.Image]) -> list[str]:
    """Save images of a sample, scaled down; returns their paths relative to the evaluation's folder."""
    paths = [out.picture(name, index, number) for number in range(len(images))]
    with must_write(out.gallery, WAY_OUT):
        out.gallery.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            small = image.copy()
            small.thumbnail((GALLERY_SIDE, GALLERY_SIDE))
            small.save(path)
    return [path.relative_to(out.path).as_posix() for path in paths]


def _save_view(out: EvaluationFolder, name: str, index: int, view: dict[str, Any] | None) -> None:
    if view is not None:
        with must_write(out.gallery, WAY_OUT):
            write_atomic(out.view(name, index), to_json(view, ensure_ascii=False))


def _batches(entries: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""Runs benchmarks on a model: replies in batches of like length, shared by ranks, kept as they come, then scored."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm import __version__
from alignvlm.config.places import recipe_error
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import Answerer, ModelAnswerer, answer_each
from alignvlm.evaluation.benchmarks.base import Benchmark, Part, Question, find_benchmark
from alignvlm.evaluation.benchmarks.readers import Reader, open_reader
from alignvlm.evaluation.benchmarks.scoring import score_rows
from alignvlm.evaluation.benchmarks.suite import COLUMNS, paper_average, paper_table
from alignvlm.evaluation.items import Item
from alignvlm.progress import Progress, say
from alignvlm.run_folder import BenchmarkFolder
from data_pipeline.files import JsonLinesLog, must_write, read_json, read_json_lines, write_atomic, write_json_lines
from data_pipeline.samples.images import decode_image, image_size
from data_pipeline.samples.schema import SampleError

BENCHMARK_VERSION = 1
"""Raised when prompts, replies or files change, so that older results are computed again."""
WINDOW = 4
"""Batches whose questions are sorted by length together, and answered by one rank."""
WAY_OUT = "make the folder writable and free some space, or give another one: --out FOLDER"
PACKAGES = ("torch", "transformers", "pillow", "numpy", "rapidfuzz", "pyarrow", "spacy")
REPLY = {"index": int, "id": str, "prompt": str, "reply": str, "gold": dict}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A benchmark with everything that decides its replies and scores, the model apart."""

    benchmark: Benchmark
    reader: Reader
    flavour: str
    limit: int | None

    @classmethod
    def of(cls, name: str, path: str | Path, flavour: str | None = None, limit: int | None = None) -> Job:
        """Open the files of a benchmark. Raises UserError as the readers do."""
        benchmark = find_benchmark(name)
        reader = open_reader(Path(path), benchmark.sources, name)
        return cls(benchmark, reader, benchmark.flavour(flavour, reader.layout), limit)

    @property
    def end(self) -> int | None:
        """Number behind the last row; None where the file is read to its end."""
        return self.reader.size if self.limit is None else self.reader.end(self.limit)

    def described(self) -> str:
        """One line for the user."""
        size = "" if self.reader.size is None else f", {self.reader.size:,} rows"
        limit = "" if self.limit is None else f", the first {self.limit:,}"
        files = str(self.reader.files[0]) + (f" and {len(self.reader.files) - 1} more" if self.reader.files[1:] else "")
        return f"{self.benchmark.title}: {self.reader.layout} layout, {files}{size}{limit}; flavour {self.flavour}"

    def identity(self, model: str) -> str:
        """Changes with the model, the data or a setting that the replies or scores depend on."""
        return _hash(
            [BENCHMARK_VERSION, self.benchmark.name, self.flavour, self.limit, model, _stats(self.reader.files)]
        )


def jobs_of_recipe(recipe: Recipe, limit: int | None = None) -> list[Job]:
    """The benchmarks of `evaluation.benchmarks`, with at most `limit` questions each.

    Raises:
        UserError: with the line of one that cannot be used.
    """
    jobs = []
    for name, benchmark in recipe.evaluation.benchmarks.items():
        try:
            limits = [number for number in (limit, benchmark.limit) if number is not None]
            jobs.append(Job.of(name, benchmark.path, benchmark.flavour, min(limits, default=None)))
        except UserError as error:
            key = f"evaluation.benchmarks.{name}"
            raise recipe_error(recipe, key, f"{key}: {error}") from error
    return jobs


def run_benchmarks(
    model_folder: str | Path,
    jobs: Sequence[Job],
    out_folder: str | Path,
    *,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    device: Any = None,
    answerer: Answerer | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Replies to all questions and their scores; every rank calls this and gets the same results.

    Written are `<out>/<benchmark>.jsonl` (per question the prompt, the raw reply and the references),
    `<out>/<benchmark>.unusable.jsonl` where a question could not be asked, `<out>/results.json`, and `<out>/paper.md`
    for the benchmarks of the paper's table. Replies are kept batch by batch: a run that was killed goes on where it
    was. A benchmark whose results are still valid is not run again. Batches do not depend on the number of ranks.

    Args:
        barrier: waits for all ranks; needed when `world_size` > 1.
        answerer: used instead of loading `model_folder`, which still identifies the results.

    Returns:
        The content of results.json: {"model", "benchmarks": {name: entry}}.
    """
    if world_size > 1 and barrier is None:
        raise ValueError("run_benchmarks needs a barrier when world_size > 1")
    out = BenchmarkFolder(Path(out_folder))
    model = _model_identity(Path(model_folder))
    known = {name: e for name, e in read_results(out).get("benchmarks", {}).items() if e.get("model_files") == model}
    for job in jobs:
        name, identity = job.benchmark.name, job.identity(model)
        valid = known.get(name, {}).get("identity") == identity
        if not valid:
            answerer = answerer or ModelAnswerer.load(model_folder, device)
            _answer(job, answerer, out.parts(name, identity), batch_size, rank, world_size, progress)
        if barrier is not None:
            barrier()
        if rank == 0 and not valid:
            known[name] = _finish(job, out, identity, batch_size) | {"model_files": model}
            with must_write(out.path, WAY_OUT):
                results: dict[str, Any] = {"model": str(model_folder), "benchmarks": known}
                if set(known) & set(COLUMNS):
                    results["paper_average"] = paper_average(known)
                    write_atomic(out.paper, paper_table(str(model_folder), known))
                write_atomic(out.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        if barrier is not None:
            barrier()
    return read_results(out)


def read_results(folder: BenchmarkFolder) -> dict[str, Any]:
    """Content of results.json; {} before the first benchmark is finished."""
    entry = {"score?": float, "scores": {str: float}, "items": int, "flavour": str, "headline": str}
    return read_json(folder.results, {"model": str, "benchmarks": {str: entry}})


def _model_identity(folder: Path) -> str:
    """Changes with the model's files."""
    return _hash(_stats(sorted(folder.iterdir()) if folder.is_dir() else []))


def _stats(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _hash(state: Any) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _answer(
    job: Job, answerer: Answerer, parts: Path, batch_size: int, rank: int, world_size: int, progress: bool
) -> None:
    """Answer this rank's windows of questions and append the replies to its part."""
    with must_write(parts, WAY_OUT):
        parts.mkdir(parents=True, exist_ok=True)
    done = {row["index"] for path in parts.glob("*.jsonl") for row in read_json_lines(path, {"index": int})}
    part = JsonLinesLog(parts / f"{rank}-of-{world_size}.jsonl")
    window = WINDOW * batch_size
    mine = lambda number: number // window % world_size == rank
    how = job.benchmark.flavours[job.flavour]
    shown = job.end if job.end is None else sum(map(mine, range(job.end)))
    try:
        with Progress(job.benchmark.title, shown, enabled=progress and rank == 0) as bar:
            for questions in _windows(job, mine, window):
                ordered = sorted(questions, key=lambda asked: (_length(asked[1], answerer), asked[0]))
                for start in range(0, len(ordered), batch_size):
                    batch = ordered[start : start + batch_size]
                    if not {number for number, _ in batch} <= done:
                        for row in _reply_to(job, batch, answerer, how.max_new_tokens):
                            part.append(row)
                    bar.advance(len(batch))
    finally:
        part.close()


def _windows(job: Job, mine: Callable[[int], bool], size: int) -> Iterator[list[tuple[int, Question]]]:
    """This rank's questions, those of one window of rows together."""
    window: list[tuple[int, Question]] = []
    current = -1
    for number, record in job.reader.records(mine, job.end):
        if number // size != current:
            if window:
                yield window
            window, current = [], number // size
        question = job.benchmark.question(job.reader.layout, number, record)
        if question is not None:
            window.append((number, question))
    if window:
        yield window


def _length(question: Question, answerer: Answerer) -> int:
    """About how many tokens a prompt has: those of its pictures, and one per four letters."""
    tokens = 0
    for image in question.images:
        try:
            tokens += answerer.visual_tokens(*image_size(_bytes_of(image)))
        except SampleError:  # named when it is decoded
            continue
    return tokens + (len(question.text) + sum(map(len, question.options.values()))) // 4


def _bytes_of(image: bytes | Path) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def _reply_to(
    job: Job, batch: Sequence[tuple[int, Question]], answerer: Answerer, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One line per question: its raw reply, or the error where it cannot be asked."""
    how = job.benchmark.flavours[job.flavour]
    asked: list[tuple[int, Question, list[Part], Item]] = []
    started = time.monotonic()
    for number, question in batch:
        content, pictures = how.message(question)
        try:
            images = [decode_image(_bytes_of(picture)) for picture in pictures]
        except SampleError as error:
            yield {"index": number, "id": question.id, "error": str(error)}
            continue
        item = Item(question.id, 0, question.text, [], [{"role": "user", "content": content}], images)
        asked.append((number, question, content, item))
    items = [item for *_, item in asked]
    if job.benchmark.continuations:
        replies: list[Any] = [_most_likely(job.benchmark, answerer, content) for _, _, content, _ in asked]
    else:
        replies = list(answer_each(answerer, items, max_new_tokens)) if items else []
    seconds = (time.monotonic() - started) / max(len(asked), 1)
    for (number, question, content, _), reply in zip(asked, replies, strict=True):
        row = {"index": number, "id": question.id}
        if isinstance(reply, SampleError):
            yield row | {"error": str(reply)}
        else:
            text = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
            yield row | {"prompt": text, "reply": reply, "gold": question.gold, "seconds": round(seconds, 4)}


def _most_likely(benchmark: Benchmark, answerer: Answerer, content: Sequence[Part]) -> str:
    """The continuation that the model finds most likely, stripped."""
    prompt = "".join(part["text"] for part in content)
    likely = answerer.log_likelihoods(prompt, benchmark.continuations)
    return benchmark.continuations[likely.index(max(likely))].strip()


def _finish(job: Job, out: BenchmarkFolder, identity: str, batch_size: int) -> dict[str, Any]:
    """Join the parts, score them and write the benchmark's lines; returns its entry of results.json."""
    benchmark, how = job.benchmark, job.benchmark.flavours[job.flavour]
    parts = out.parts(benchmark.name, identity)
    rows = {
        row["index"]: row for path in sorted(parts.glob("*.jsonl")) for row in read_json_lines(path, {"index": int})
    }
    ordered = [rows[number] for number in sorted(rows)]
    answered = [row for row in ordered if "error" not in row]
    unusable = [row for row in ordered if "error" in row]
    if not ordered:
        raise UserError(f"{job.reader.files[0]}: no row of it belongs to {benchmark.name}")
    scored = score_rows(benchmark, answered, job.flavour)
    seconds = sum(row.pop("seconds", 0.0) for row in answered)
    write_json_lines(out.replies(benchmark.name), answered)
    submission = benchmark.submission(answered)
    if submission is not None:
        write_atomic(out.submission(benchmark.name), json.dumps(submission, indent=1, ensure_ascii=False) + "\n")
    out.unusable(benchmark.name).unlink(missing_ok=True)
    if unusable:
        write_json_lines(out.unusable(benchmark.name), unusable)
        first = unusable[0]
        log.warning(
            "%s: %d questions could not be asked, see %s (first: %s: %s)",
            benchmark.name, len(unusable), out.unusable(benchmark.name), first["id"], first["error"],
        )  # fmt: skip
    entry = {
        **scored,
        "title": benchmark.title,
        "flavour": job.flavour,
        "layout": job.reader.layout,
        "data": [str(file) for file in job.reader.files[:8]],
        "published_items": benchmark.expected_items(job.reader.layout)[0],
        "unreadable": len(unusable),
        "limit": job.limit,
        "prompt": answered[0]["prompt"] if answered else "",
        "generation": {"max_new_tokens": how.max_new_tokens, "do_sample": False, "num_beams": 1, "until": how.until},
        "batch_size": batch_size,
        "seconds": round(seconds, 3),
        "replies_per_second": round(len(answered) / seconds, 3) if seconds else None,
        "versions": _versions(),
        "identity": identity,
    }
    entry["notes"] = [*scored["notes"], *job.reader.notes, *_warnings(job, len(ordered))]
    if unusable:
        entry["notes"].append(f"{len(unusable):,} of {len(ordered):,} questions could not be asked and do not count")
    for path in parts.glob("*.jsonl"):
        path.unlink()
    parts.rmdir()
    return entry


def _warnings(job: Job, items: int) -> list[str]:
    """A number of rows that is not the published set's."""
    if job.limit is not None:
        return [f"the first {items:,} questions only: not comparable with published numbers"]
    benchmark, expected = job.benchmark, job.benchmark.expected_items(job.reader.layout)
    if items not in expected:
        known = "has" if benchmark.verified_items else "is said to have"
        note = f"{items:,} questions, the published set {known} {expected[0]:,}"
        log.warning("%s: %s", benchmark.name, note)
        return [note]
    return []


def _versions() -> Mapping[str, str]:
    versions = {"alignvlm": __version__, "benchmarks": str(BENCHMARK_VERSION)}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def announce(jobs: Sequence[Job]) -> None:
    """Say what each benchmark reads."""
    for job in jobs:
        say(job.described())

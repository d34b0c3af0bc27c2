"""Runs benchmarks on a model: the replies of all ranks, their scores, and the files that keep both."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignvlm import __version__
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import Answerer, ModelAnswerer
from alignvlm.evaluation.benchmarks.job import BENCHMARK_VERSION, Job, model_identity
from alignvlm.evaluation.benchmarks.replies import ask
from alignvlm.evaluation.benchmarks.scoring import score_rows
from alignvlm.evaluation.benchmarks.suite import COLUMNS, paper_average, paper_table
from alignvlm.run_folder import WAY_OUT, BenchmarkFolder
from alignvlm.system.ranks import ALONE, Ranks
from data_pipeline.files import must_write, read_json, read_json_lines, write_atomic, write_json_lines

PACKAGES = ("torch", "transformers", "pillow", "numpy", "rapidfuzz", "pyarrow", "spacy")
log = logging.getLogger(__name__)


def run_benchmarks(
    model_folder: str | Path,
    jobs: Sequence[Job],
    out_folder: str | Path,
    *,
    batch_size: int = 16,
    ranks: Ranks = ALONE,
    device: Any = None,
    answerer: Answerer | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Replies to all questions and their scores; every rank calls this and gets the same results, or errors.

    Written are `<out>/<benchmark>.jsonl` (per question the prompt, the raw reply and the references),
    `<out>/<benchmark>.unusable.jsonl` where a question could not be asked, `<out>/results.json`, and `<out>/paper.md`
    for the benchmarks of the paper's table. Replies are kept batch by batch: a run that was killed goes on where it
    was. A benchmark whose results are still valid is not run again. Batches do not depend on the number of ranks.

    Args:
        ranks: those that share the questions, as in `evaluate`.
        answerer: used instead of loading `model_folder`, which still identifies the results.

    Returns:
        The content of results.json: {"model", "benchmarks": {name: entry}}.
    """
    out = BenchmarkFolder(Path(out_folder))
    model, known, identities = ranks.of_main(_done, jobs, Path(model_folder), out)
    load = functools.cache(lambda: answerer or ModelAnswerer.load(model_folder, device))

    def finish(job: Job, identity: str) -> None:
        known[job.benchmark.name] = _finish(job, out, identity, batch_size) | {"model_files": model}
        with must_write(out.path, WAY_OUT):
            results: dict[str, Any] = {"model": str(model_folder), "benchmarks": known}
            if set(known) & set(COLUMNS):
                results["paper_average"] = paper_average(known)
                write_atomic(out.paper, paper_table(str(model_folder), known))
            write_atomic(out.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    named = {job.benchmark.name: (job, identity) for job, identity in zip(jobs, identities, strict=True)}
    for name in [name for name, (_, identity) in named.items() if known.get(name, {}).get("identity") != identity]:
        job, identity = named[name]
        ranks.together(ask, job, load, out.parts(name, identity), batch_size, ranks, progress)
        ranks.of_main(finish, job, identity)
    return ranks.of_main(read_results, out)


def _done(
    jobs: Sequence[Job], model_folder: Path, out: BenchmarkFolder
) -> tuple[str, dict[str, dict[str, Any]], list[str]]:
    """(identity of the model, entries of results.json that are this model's, identity of each job)."""
    model = model_identity(model_folder)
    known = {name: e for name, e in read_results(out).get("benchmarks", {}).items() if e.get("model_files") == model}
    return model, known, [job.identity(model) for job in jobs]


def read_results(folder: BenchmarkFolder) -> dict[str, Any]:
    """Content of results.json; {} before the first benchmark is finished."""
    entry = {"score?": float, "scores": {str: float}, "items": int, "flavour": str, "headline": str}
    return read_json(folder.results, {"model": str, "benchmarks": {str: entry}})


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

"""A benchmark with its files, opened: what is asked, and in whose flavour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignvlm.config.places import recipe_error
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.base import Benchmark, find_benchmark, owners_of
from alignvlm.evaluation.benchmarks.readers import Reader, open_reader
from alignvlm.progress import say
from data_pipeline.checksums import digest

BENCHMARK_VERSION = 2
"""Raised when prompts, replies or files change, so that older results are computed again."""


@dataclass(frozen=True)
class Job:
    """A benchmark with everything that decides its replies and scores, the model apart."""

    benchmark: Benchmark
    reader: Reader
    flavour: str
    limit: int | None

    @classmethod
    def of(cls, name: str, path: str | Path, flavour: str | None = None, limit: int | None = None) -> Job:
        """Open the files of a benchmark. Raises UserError as the readers do, and for another benchmark's file."""
        benchmark = find_benchmark(name)
        reader = open_reader(Path(path), benchmark.sources, name)
        owners = owners_of(reader.files[0])
        if owners and name not in owners:
            raise UserError(
                f"{reader.files[0]}: its name is that of benchmark {owners[0]!r}, not {name!r}; "
                "give the benchmark of the file, or rename it"
            )
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
        return digest(
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


def announce(jobs: Sequence[Job]) -> None:
    """Say what each benchmark reads."""
    for job in jobs:
        say(job.described())


def model_identity(folder: Path) -> str:
    """Changes with the model's files."""
    return digest(_stats(sorted(folder.iterdir()) if folder.is_dir() else []))


def _stats(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
